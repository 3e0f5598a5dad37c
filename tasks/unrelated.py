"""Questions that no task trains on, to measure how far training has changed a policy outside its task.

Each is asked as a chat of one message, without a system prompt. A run stores the token ids of their prompts, so a
change of this list affects only new runs.
"""

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Who wrote Hamlet?",
    "Name three kinds of fruit.",
    "How do bees make honey?",
    "What is a mammal?",
    "Translate good morning to Spanish.",
    "What does DNA stand for?",
    "Write a line about the sea.",
    "When did World War II end?",
    "How do I boil an egg?",
    "What is the opposite of hot?",
    "Name the largest ocean.",
    "What is photosynthesis?",
    "Who painted the Mona Lisa?",
    "Suggest a name for a cat.",
    "What do pandas eat?",
    "Is the earth round?",
    "What is a haiku?",
    "How far away is the moon?",
    "Name a prime minister of India.",
    "What is water made of?",
    "Finish the saying: better late than",
    "What language is spoken in Brazil?",
)
