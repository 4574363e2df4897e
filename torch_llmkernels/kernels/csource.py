"""What we read off a kernel's C text without compiling it: its entry functions, and tokens that the format forbids.

The deny list is a guard, not a sandbox. It keeps honest code portable and refuses the obvious (includes, inline assembly on the
host, system calls, constructors), with a message that a model can repair from. A determined author of native code could get past
any list of tokens; that is why the CPU target also checks the symbols that the shared object imports, and why a candidate runs in
a worker process of its own until it is accepted.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import NamedTuple

from torch_llmkernels.errors import KernelSourceError

SCALAR_TYPES: dict[str, str] = {
    "bool": "bool",
    "int": "i32", "signed": "i32", "signed int": "i32", "int32_t": "i32",
    "unsigned": "u32", "unsigned int": "u32", "uint32_t": "u32",
    "long long": "i64", "long long int": "i64", "long": "i64", "int64_t": "i64", "ptrdiff_t": "i64",
    "unsigned long long": "u64", "unsigned long": "u64", "uint64_t": "u64", "size_t": "u64",
    "float": "f32", "double": "f64", "ACC": "acc",
}  # fmt: skip
"""C spellings of scalar parameters; `acc` is f64 for a float64 task, else f32."""

PRAGMAS = {"cuda": (r"unroll\b", r"nounroll\b"), "cpu": (r"omp\b", r"unroll\b", r"GCC\s+ivdep\b", r"GCC\s+unroll\b")}
_DIRECTIVES = ("define", "undef", "if", "ifdef", "ifndef", "elif", "else", "endif", "error", "pragma")

_FORBIDDEN = {"_Pragma", "__pragma", "__has_include", "__has_embed", "__managed__"}
_FORBIDDEN_CPU = {
    "asm", "__asm", "__asm__", "system", "popen", "fork", "vfork", "clone", "syscall", "ptrace",
    "execl", "execle", "execlp", "execv", "execve", "execvp", "execvpe", "posix_spawn", "dlopen", "dlsym", "dlmopen",
    "fopen", "freopen", "fdopen", "tmpfile", "open", "openat", "creat", "socket", "mmap", "mprotect", "munmap",
    "getenv", "setenv", "putenv", "unsetenv", "environ", "printf", "fprintf", "puts", "putchar", "fputs", "fputc", "fwrite",
    "fread", "perror", "cout", "cerr", "cin", "ifstream", "ofstream", "fstream", "filesystem", "thread", "jthread", "async",
    "pthread_create", "pthread_self", "longjmp", "setjmp", "sigaction", "signal", "raise", "kill", "abort", "quick_exit", "_exit",
    "_Exit", "atexit", "exit", "constructor", "__constructor__", "destructor", "__destructor__", "init_priority", "section",
    "__section__", "ifunc", "weakref", "alias", "__alias__", "thread_local",
}  # fmt: skip
# ordinary words too, so only refused where they are called
_FORBIDDEN_CALLS_CPU = {
    "read", "write", "close", "send", "recv", "connect", "bind", "listen", "accept", "select", "poll", "remove", "rename",
    "unlink", "pipe", "wait", "trap", "exec", "spawn",
}  # fmt: skip

_TOKEN = re.compile(
    r"""(?P<number>\.?\d(?:[eEpP][+-]|[\w.]|'(?=\w))*)"""  # before the others: digit separators look like character literals
    r"""|(?P<comment>//[^\n]*|/\*.*?\*/)|(?P<raw>(?:u8|u|U|L)?R"[^\n(]{0,16}\()|(?P<string>"(?:\\.|[^"\\\n])*")"""
    r"""|(?P<name>[A-Za-z_]\w*)|(?P<char>'(?:\\.|[^'\\\n])+')|(?P<space>\s+)|(?P<other>.)""",
    re.DOTALL,
)


class Token(NamedTuple):
    """A token of the body: `kind` is name, number, string, char or other; `line` counts from the file's first line."""

    kind: str
    text: str
    line: int


@dataclasses.dataclass(frozen=True)
class Param:
    """A parameter of an entry function: `type` is pointer, tensor_map, acc or a value of `SCALAR_TYPES`."""

    name: str
    type: str


@dataclasses.dataclass(frozen=True)
class Function:
    """An `extern "C"` function that the body defines."""

    name: str
    params: tuple[Param, ...]
    line: int
    is_global: bool


def tokenize(body: str, first_line: int = 1) -> list[Token]:
    """The body's tokens without comments and white space.

    Raises:
        KernelSourceError: for raw string literals, which would hide code from this reader.
    """
    tokens: list[Token] = []
    line = first_line
    for match in _TOKEN.finditer(body):  # without gaps: `other` matches any character
        kind, text = match.lastgroup or "", match.group()
        if kind == "raw":
            raise KernelSourceError(f"line {line}: raw string literals are not allowed; a kernel needs no strings")
        if kind in ("comment", "space"):
            line += text.count("\n")
        else:
            tokens.append(Token(kind, text, line))
            if kind in ("string", "char"):  # a backslash may end a line inside
                line += text.count("\n")
    return tokens


def check_tokens(body: str, tokens: list[Token], target: str, first_line: int = 1) -> None:
    """Refuse what the restricted source does not allow.

    Raises:
        KernelSourceError: naming the line, the token and what to do instead.
    """
    _check_spelling(body, first_line)
    for i, token in enumerate(tokens):
        following = tokens[i + 1].text if i + 1 < len(tokens) else ""
        if token.text == "#" and token.kind == "other":
            _check_directive(token, following, body, target, first_line)
        elif token.kind == "name":
            _check_name(token, following, target)
            if target == "cuda" and token.text in ("__device__", "static"):
                _check_constant(tokens, i)


def _check_constant(tokens: list[Token], start: int) -> None:
    """Refuse a mutable variable with static storage: it would keep state from call to call."""
    i, words = start, []
    while i < len(tokens) and tokens[i].text not in ";={[":
        words.append(tokens[i].text)
        if i + 1 < len(tokens) and tokens[i + 1].text == "(":
            if not _is_attribute(tokens[i]):
                return  # a function
            i = _closing(tokens, i + 1)
        i += 1
    if not {"const", "constexpr", "struct", "class", "enum", "union", "operator", "__constant__", "__shared__"} & set(words):
        raise KernelSourceError(
            f"line {tokens[start].line}: `{' '.join(words)}` keeps state from call to call; use a [[workspace]], or const for a "
            "table"
        )


def constant_members(tokens: list[Token]) -> frozenset[str]:
    """Names of `static constexpr` members with an initialiser."""
    found = set()
    for i, token in enumerate(tokens):
        if {token.text, tokens[i - 1].text if i else ""} == {"static", "constexpr"}:
            rest = iter(tokens[i + 1 :])
            words = [*itertools.takewhile(lambda t: t.text not in ("=", ";", "{", "("), rest)]
            found |= {words[-1].text} if words else set()
    return frozenset(found)


def _is_attribute(token: Token) -> bool:
    return token.text.startswith("__") or token.text == "alignas"


def _check_spelling(body: str, first_line: int) -> None:
    """Line splices inside words, digraphs and trigraphs would let code look different to us than to the compiler."""
    for pattern, what in (
        (r"\S\\[ \t]*\r?\n", "a line continuation right after a character; put a space before the backslash"),
        (r"\?\?[=/'()!<>-]", "a trigraph; write the character itself"),
        (r"%:", "the digraph %:; write the character itself, or put a space between"),
        (r"\\[uU][0-9a-fA-F]{4}", "a universal character name; write plain ASCII"),
    ):
        found = re.search(pattern, body)
        if found:
            raise KernelSourceError(f"line {first_line + body.count(chr(10), 0, found.start())}: {what}")


def _check_directive(token: Token, word: str, body: str, target: str, first_line: int) -> None:
    if word == "#":
        raise KernelSourceError(f"line {token.line}: token pasting (##) is not allowed; write the name out or use a template")
    if word == "include":
        raise KernelSourceError(f"line {token.line}: #include is not allowed; the prelude brings the types, math and intrinsics")
    if word not in _DIRECTIVES:
        raise KernelSourceError(f"line {token.line}: '#{word}' is not allowed (one of #{', #'.join(_DIRECTIVES)})")
    if word == "pragma":
        text = body.splitlines()[token.line - first_line].partition("#")[2].strip().removeprefix("pragma").strip()
        if "num_threads" in text:
            raise KernelSourceError(f"line {token.line}: num_threads is not allowed; torch.set_num_threads decides")
        if not any(re.match(allowed, text) for allowed in PRAGMAS[target]):
            names = ", ".join(p.replace(r"\b", "").replace(r"\s+", " ") for p in PRAGMAS[target])
            raise KernelSourceError(f"line {token.line}: #pragma {text} is not allowed on {target} (one of: {names})")


def _check_name(token: Token, following: str, target: str) -> None:
    name = token.text.removeprefix("__builtin_")
    if name in _FORBIDDEN:
        raise KernelSourceError(f"line {token.line}: '{token.text}' is not allowed in a kernel")
    if target != "cpu":
        return
    if name in _FORBIDDEN_CPU or (name in _FORBIDDEN_CALLS_CPU and following == "("):
        raise KernelSourceError(
            f"line {token.line}: '{token.text}' is not allowed in a CPU kernel: it computes on its arguments, with no "
            "system calls, files, threads of its own (use #pragma omp), inline assembly or load-time code; rename it if it "
            "is your own name"
        )


def entry_functions(tokens: list[Token], target: str) -> dict[str, Function]:
    """Every `extern "C"` function with its parameters.

    Raises:
        KernelSourceError: for any other use of `extern`, and for a parameter whose type we cannot pass.
    """
    functions: dict[str, Function] = {}
    for i, token in enumerate(tokens):
        if token.kind != "name" or token.text != "extern":
            continue
        if i + 1 < len(tokens) and tokens[i + 1].text == '"C"':
            function = _function(tokens, i + 2)
            if function.name in functions and functions[function.name].params != function.params:
                raise KernelSourceError(f"line {function.line}: {function.name} is defined twice with different parameters")
            functions[function.name] = function
        elif not (target == "cuda" and _is_shared(tokens, i)):
            also = " or `extern __shared__`" if target == "cuda" else ""
            raise KernelSourceError(f'line {token.line}: `extern` may only start an `extern "C"` kernel definition{also}')
    return functions


def _is_shared(tokens: list[Token], i: int) -> bool:
    return any(t.text == "__shared__" for t in tokens[i + 1 : i + 4])


def _function(tokens: list[Token], start: int) -> Function:
    """Read `void name(params) {`, skipping attributes such as `__launch_bounds__(256)`, from the token after `extern "C"`."""
    i, is_global, name = start, False, None
    while i < len(tokens) and name is None:
        token, following = tokens[i], tokens[i + 1].text if i + 1 < len(tokens) else ""
        if token.text in "{;=":
            raise KernelSourceError(f'line {token.line}: write `extern "C"` in front of each kernel definition, without a block')
        is_global |= token.text == "__global__"
        if token.kind == "name" and following == "(":
            if _is_attribute(token):
                i = _closing(tokens, i + 1)
            else:
                name = token
        i += 1
    if name is None:
        raise KernelSourceError(f'line {tokens[start - 1].line}: `extern "C"` without a function definition')
    end = _closing(tokens, i)
    if end + 1 >= len(tokens) or tokens[end + 1].text != "{":
        raise KernelSourceError(f'line {name.line}: `extern "C"` {name.text} is declared but not defined here; write its body')
    if not any(t.text == "void" for t in tokens[start:i]):
        raise KernelSourceError(f"line {name.line}: kernel {name.text} must return void")
    params = tuple(_param(p, name) for p in _split(tokens[i + 1 : end]))
    return Function(name.text, params, name.line, is_global)


def _closing(tokens: list[Token], opening: int) -> int:
    depth = 0
    for i in range(opening, len(tokens)):
        depth += {"(": 1, ")": -1}.get(tokens[i].text, 0)
        if depth == 0:
            return i
    raise KernelSourceError(f"line {tokens[opening].line}: '(' is never closed")


def _split(tokens: list[Token]) -> list[list[Token]]:
    parts: list[list[Token]] = [[]]
    for token in tokens:
        if token.text == ",":
            parts.append([])
        else:
            parts[-1].append(token)
    return [] if parts == [[]] or [t.text for t in parts[0]] == ["void"] else parts


def _param(tokens: list[Token], function: Token) -> Param:
    where = f"line {function.line}: {function.text}"
    if len(tokens) < 2 or tokens[-1].kind != "name":
        raise KernelSourceError(f"{where}: cannot read the parameter `{' '.join(t.text for t in tokens)}`; write `type name`")
    texts, name = [t.text for t in tokens[:-1]], tokens[-1].text
    words = [t for t in texts if t not in ("const", "__restrict__", "__restrict", "volatile")]
    if "*" in words:
        if words.count("*") > 1 or "&" in words:
            raise KernelSourceError(f"{where}: parameter {name} is a pointer to a pointer; tensors arrive as plain pointers")
        return Param(name, "pointer")
    if words == ["__grid_constant__", "TensorMap"] and "const" in texts:
        return Param(name, "tensor_map")
    spelling = " ".join(w for w in words if w != "__grid_constant__")
    if spelling not in SCALAR_TYPES:
        raise KernelSourceError(
            f"{where}: parameter {name} has type `{' '.join(texts)}`, which cannot be passed; use a pointer, "
            f"`const __grid_constant__ TensorMap`, or one of {', '.join(SCALAR_TYPES)}"
        )
    return Param(name, SCALAR_TYPES[spelling])
