"""Independent readings of questions, and random texts."""

import operator

from tasks.arithmetic import Arithmetic

TASK = Arithmetic()


MEANING = {"+": operator.add, "-": operator.sub, "*": operator.mul}
