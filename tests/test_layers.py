"""The structure of the project: imports point down only, everything is annotated and said, nothing is executed."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STARTER = ("grpo.starter.build", "grpo.starter.data")  # a script and its data: they may use everything
SCRIPTS = ("train_grpo", "inference", "plot_metrics")
HEAVY = {"torch", "transformers", "numpy", "safetensors", "tokenizers", "matplotlib", "scipy"}
# imported lazily; a missing one is answered with the line that installs it
OPTIONAL = {"tasks.common.sources": {"datasets", "pyarrow"}}
LIGHT = (
    *SCRIPTS,
    "grpo.config",
    "grpo.setting",
    "grpo.model_card",
    "grpo.launch.run_folder",
    "grpo.launch.command",
    "grpo.launch.config_file",
    "grpo.launch.start",
    "grpo.launch.options",
    "grpo.runtime.atomic_io",
    "grpo.runtime.console",
)  # imported before --help answers
SHARED = ("tasks.common", "tasks.rewards", "tasks.selection")  # by all tasks
# what grpo/ may know of tasks/: no concrete task
ANY_TASK = {
    *("base", "registry", "unrelated", "common.prompts", "common.shots", "common.user_file", "common.watch"),
    *("rewards.functions", "rewards.scoring", "selection.mixture"),
}

# The folders and files of grpo/ that each may import, besides itself.
SETTINGS = {"config", "model_card", "setting"}
MAY_IMPORT = {
    "runtime": set(),
    "diagnostics": {"evaluation.intervals", "record.schema"},
    "setting": set(),
    "config": {"setting"},
    "model_card": {"config", "setting"},
    "record": {"runtime"},
    "scoring": {"runtime"},
    "model": {*SETTINGS, "runtime", "scoring"},
    "generation": {*SETTINGS, "runtime", "scoring", "model"},
    "algorithm": {*SETTINGS, "runtime", "scoring", "model", "generation"},
    "evaluation": {*SETTINGS, "runtime", "scoring", "model", "generation"},
    "plots": {*SETTINGS, "runtime", "record"},
    "interrupts": {*SETTINGS, "runtime"},
    "sft": {*SETTINGS, "runtime", "scoring", "model", "algorithm"},
    "plain": {*SETTINGS, "model", "generation", "algorithm"},
    "report": {*SETTINGS, "runtime", "record", "scoring", "model", "generation", "algorithm", "evaluation"},
}
MAY_IMPORT["launch"] = MAY_IMPORT["report"] | {"report", "sft", "plots"}
MAY_IMPORT["step_probe"] = {*SETTINGS, "runtime", "model", "record", "algorithm"}
MAY_IMPORT["launch"] |= {"step_probe"}
MAY_IMPORT["resume"] = MAY_IMPORT["report"] | {"report"}
MAY_IMPORT["measurer"] = MAY_IMPORT["resume"] | {"resume", "diagnostics"}
MAY_IMPORT["trainer"] = {*MAY_IMPORT}


def sources():
    """Every file of the project but the tests, by the name of its module."""
    files = [*ROOT.glob("*.py"), *(ROOT / "tasks").rglob("*.py"), *(ROOT / "grpo").rglob("*.py")]
    modules = {}
    for path in sorted(files):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


SOURCES = sources()
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in SOURCES.items()}


def is_for_types(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(module, top_level_only=False):
    """The modules that a module imports, wherever in it: `from grpo.launch import seeds` is grpo.launch.seeds.

    What is imported for type checkers alone is not imported.
    """
    body = TREES[module].body if top_level_only else ast.walk(TREES[module])
    for_types = {id(part) for node in TREES[module].body if is_for_types(node) for part in node.body}
    body = [node for node in body if id(node) not in for_types]
    found = set()
    for node in body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (full & set(SOURCES)) or {node.module}
    return found


def of_project(modules):
    return {name for name in modules if name.split(".")[0] in ("tasks", "grpo", *SCRIPTS)}


def test_the_top_level_holds_the_three_scripts_and_no_other_module():
    assert {module for module in SOURCES if "." not in module} == {*SCRIPTS, "tasks", "grpo"}


@pytest.mark.parametrize("module", [module for module in SOURCES if module.startswith("tasks")])
def test_a_task_is_strings_and_numbers_only(module):
    roots = {name.split(".")[0] for name in imports(module)}
    assert not roots & (HEAVY | {"grpo"})
    optional = OPTIONAL.get(module, set())
    assert roots <= {*sys.stdlib_module_names, "tasks"} | optional
    assert not {name.split(".")[0] for name in imports(module, top_level_only=True)} & optional


def test_what_all_tasks_share_knows_no_task():
    shared = {"tasks.base", *(m for m in SOURCES if m.startswith(SHARED))}
    for module in shared:
        assert of_project(imports(module)) <= shared, module
    assert of_project(imports("tasks.base")) == set()
    assert "tasks.skills" not in imports("tasks.arithmetic")


@pytest.mark.parametrize(
    "module", [m for m in SOURCES if m.startswith("grpo.") and m not in ("grpo.starter", *STARTER)]
)
def test_imports_of_grpo_follow_the_rules_of_its_folders(module):
    part = module.split(".")[1]
    for name in imports(module):
        package, _, inside = name.partition(".")
        if package == "tasks":
            assert inside in ANY_TASK, f"{module} imports {name}: grpo/ knows no concrete task"
        if package == "grpo" and inside:
            allowed = MAY_IMPORT[part] | {part}
            assert inside in allowed or inside.split(".")[0] in allowed, f"{module} imports {name}"


@pytest.mark.parametrize("module", [m for m in SOURCES if m.startswith("grpo.plots") or m.endswith("step_metrics")])
def test_plots_need_no_torch(module):
    assert not {name.split(".")[0] for name in imports(module)} & {"torch", "transformers"}


@pytest.mark.parametrize("module", [m for m in SOURCES if m.startswith("grpo.diagnostics")])
def test_findings_are_read_from_the_metrics_alone(module):
    names = {name.split(".")[0] for name in imports(module)}
    assert not names & (HEAVY | {"tasks"})


def test_no_module_imports_itself_by_a_detour():
    done = set()

    def visit(module, path):
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for name in of_project(imports(module)) & set(SOURCES):
                visit(name, [*path, module])
            done.add(module)

    for module in SOURCES:
        visit(module, [])


def test_nothing_imports_a_script():
    for module in SOURCES:
        assert not imports(module) & {*SCRIPTS, "grpo.starter.build"}


@pytest.mark.parametrize("module", LIGHT)
def test_what_help_needs_imports_nothing_heavy(module):
    roots = {name.split(".")[0] for name in imports(module, top_level_only=True)}
    assert not roots & HEAVY


@pytest.mark.parametrize("module", SOURCES)
def test_every_function_is_annotated(module):
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            arguments += [argument for argument in (node.args.vararg, node.args.kwarg) if argument]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            assert not bare, f"{module}.{node.name}: {bare}"
            assert node.returns is not None, f"{module}.{node.name} has no return annotation"


AUTOGRAD = ("forward", "backward")


@pytest.mark.parametrize("module", SOURCES)
def test_every_public_function_and_class_says_what_it_is(module):
    tree = TREES[module]
    if tree.body:
        assert ast.get_docstring(tree), f"{module} has no docstring"

    def check(body, prefix):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                public = not node.name.startswith("_") or node.name == "__call__"
                public &= node.name not in AUTOGRAD  # the docstring of their class says what they compute
                assert not public or ast.get_docstring(node), f"{prefix}.{node.name} has no docstring"
                if isinstance(node, ast.ClassDef):
                    check(node.body, f"{prefix}.{node.name}")

    check(tree.body, module)


# A model's text, a model's folder and a metrics file come from elsewhere: nothing in them may be executed.
FORBIDDEN = {
    "eval": r"(?<![\w.])eval\(",
    "exec": r"(?<![\w.])exec\(",
    "compile": r"(?<![\w.])compile\(",
    "import by name": r"__import__|importlib(?!\.metadata)",
    "pickle": r"\bc?[Pp]ickle|\bdill\b|\bjoblib\b|\bmarshal\b|\bshelve\b",
    "a pickled model": r"torch\.load\(|weights_only|use_safetensors\s*=\s*(False|None)|allow_pickle",
    "a model's own code": r"trust_remote_code\s*=\s*(True|None)",
    "a shell": r"os\.system|os\.popen|shell\s*=\s*True|\bsubprocess\b",
    "unsafe YAML": r"\byaml\b",
}


# --reward FILE.py:FUNCTION runs a file, which only the command line can name: here, and nowhere else
# seeds starts train_grpo.py
# trial starts itself as a child process, in which an unknown tokenizer is tried with limits
ALLOWED = {
    "tasks.common.user_file": {"import by name"},
    "grpo.launch.seeds": {"a shell"},
    "grpo.model.trial": {"a shell"},
}


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_is_executed_or_unpickled(module):
    for number, line in enumerate(SOURCES[module].read_text(encoding="utf-8").splitlines(), 1):
        for what, pattern in FORBIDDEN.items():
            if what in ALLOWED.get(module, set()):
                continue
            assert not re.search(pattern, line), f"{SOURCES[module]}:{number}: {what}: {line.strip()}"


def test_the_search_for_what_is_forbidden_finds_it_and_nothing_else():
    for line in ("x = eval(text)", "exec(code)", "import pickle", "torch.load(path)", "trust_remote_code=True"):
        assert any(re.search(pattern, line) for pattern in FORBIDDEN.values()), line
    for line in ("model.eval()", "evaluate(lm)", "re.compile(r'x')", "trust_remote_code=False", "load(path)"):
        assert not any(re.search(pattern, line) for pattern in FORBIDDEN.values()), line


@pytest.mark.parametrize("module", SOURCES)
def test_every_model_is_loaded_without_its_own_code(module):
    # transformers asks on standard input where `trust_remote_code` is not said.
    for node in ast.walk(TREES[module]):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "from_pretrained"
        ):
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert said.get("trust_remote_code") == "False", ast.unparse(node)
