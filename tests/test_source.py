"""A kernel file either follows the format or is refused with a sentence that says what, where and what to do."""

import subprocess
import sys

import pytest

from tests import tasks
from torch_llmkernels.errors import KernelSourceError
from torch_llmkernels.kernels.device import facts_for_arch
from torch_llmkernels.kernels.source import parse_kernel

HEADER = """
implements = "add.relu"
target     = "cuda"
dtypes     = ["float32", "float16"]
where      = ["n % VEC == 0", "n >= 8"]
dims       = { n = "y.numel" }
static     = ["n"]
tune       = { THREADS = [128, 256], VEC = [1, 4] }
[[launch]]
kernel = "k"
grid   = ["ceil_div(n, THREADS * VEC)"]
block  = ["THREADS"]
args   = ["a", "b", "y", "n"]
"""
BODY = 'extern "C" __global__ void __launch_bounds__(THREADS) k(const T_a* a, const T* __restrict__ b, T_y* y, int n) { }'
CPU = """/*---
implements = "add.relu"
target = "cpu"
dtypes = ["float32"]
dims = {{ n = "y.numel" }}
[[launch]]
kernel = "k"
args = ["a", "b", "y", "n"]
---*/
{}
extern "C" void k(const T* a, const T* b, T* y, int64_t n) {{ {} }}
"""


def file(header: str = HEADER, body: str = BODY) -> str:
    return f"/*---{header}---*/\n{body}\n"


def edited(old: str, new: str) -> str:
    assert old in HEADER
    return file(HEADER.replace(old, new))


def test_a_whole_file_parses_into_its_parts() -> None:
    kernel = parse_kernel(file(), "relu")
    assert kernel.implements == ("add.relu",) and kernel.dtypes == ("float32", "float16") and kernel.align == 16
    assert kernel.tensors == ("a", "b", "y")
    assert [p.type for p in kernel.launch[0].params] == ["pointer", "pointer", "pointer", "i32"]
    assert kernel.text.splitlines()[kernel.first_line] == BODY  # the body starts right behind the header's last line


def test_a_launch_that_overlaps_its_predecessor_waits_for_it() -> None:
    with pytest.raises(KernelSourceError, match="pdl_wait"):
        parse_kernel(edited('grid   =', 'pdl = true\ngrid   ='))
    header = HEADER.replace('grid   =', 'pdl = true\ngrid   =')
    assert parse_kernel(file(header, BODY.replace("{ }", "{ pdl_wait(); }"))).launch[0].pdl


@pytest.mark.parametrize(
    "text, message",
    [
        ("int main() {}", "must start with the header comment"),
        ("/*---\nimplements = 1", "not closed"),
        (edited('implements = "add.relu"', "implements = add"), "not TOML.*line 2"),
        (edited('implements = "add.relu"', ""), "'implements' is missing"),
        (edited('target     = "cuda"', 'target = "metal"'), "'metal', not one of cuda, cpu"),
        (edited('"float16"]', '"half"]'), "'dtypes'.*one or more of float64"),
        (edited("static  ", "statics "), "unknown key 'statics'.*known: implements"),
        (edited("[1, 4]", "[1, 4.5]"), "tune.VEC must be a list of different ints"),
        (edited("VEC = [1, 4]", "T_x = [1, 4]"), "tunable 'T_x'"),
        (edited("VEC = [1, 4]", f"VEC = {list(range(5000))}"), "10000 combinations"),
        (edited('static     = ["n"]', 'static = ["m"]'), "static dim 'm' is not defined"),
        (edited('static     = ["n"]', "align = 3"), "'align' is 3"),
        (edited('"y.numel"', '"y.size"'), r"dims\.n.*a tensor has .shape\[i\]"),
        (edited('"y.numel"', '"z.numel"'), "'z' is not a tensor of this kernel"),
        (edited('"y.numel"', '"n + 1"'), "dims are evaluated in order"),
        (edited('"n >= 8"', '"n >= VECS"'), "'VECS' is neither a tunable.*did you mean VEC"),
        (edited('"n >= 8"', '"n >= 8 and n < 9"'), "is not allowed"),
        (edited('"n >= 8"', '"device.cores > 1"'), "device has device.sms"),
        (edited('grid   = ["ceil_div(n, THREADS * VEC)"]', ""), r"launch\[0\]: 'grid' must have 1 to 3"),
        (edited('kernel = "k"', 'kernel = "kk"'), r"'kk' has no `extern \"C\"` definition.*defined: k"),
        (edited('"y", "n"]', '"y"]'), r"k takes 4 parameters \(a, b, y, n\) but args has 3"),
        (edited('"a", "b", "y", "n"]', '"a", "b", "y", "y"]'), "'y' is a tensor, workspace or tensor map, not a number"),
        (edited('"a", "b", "y", "n"]', '"a", "b", "n", "n"]'), "'n'.*pointer y.*name a tensor"),
        (edited("static  ", 'optional = ["bias"]\nstatic  '), "optional tensor 'bias' is not an argument"),
        (edited("[[launch]]", "[[workspace]]\nname = 'n'\ndtype = 'float32'\nshape = ['1']\n[[launch]]"), "'n' is used twice"),
        (file(HEADER.partition("[[launch]]")[0]), r"no \[\[launch\]\]"),
    ],
)
def test_a_broken_header_is_refused_with_its_place_and_reason(text: str, message: str) -> None:
    with pytest.raises(KernelSourceError, match=message):
        parse_kernel(text)


def with_body(line: str) -> str:
    return file(body=f"{line}\n{BODY}")


@pytest.mark.parametrize(
    "line, message",
    [
        ("#include <cuda.h>", "line 15: #include is not allowed"),
        ("#  \\\n include <cuda.h>", "is not allowed"),
        ("#inc\\\nlude <cuda.h>", "line continuation"),
        ("%:include <cuda.h>", "digraph"),
        ("#pragma omp parallel", "#pragma omp parallel is not allowed on cuda"),
        ("#define GLUE(a, b) a##b", "token pasting"),
        ("#line 1", "'#line' is not allowed"),
        ('const char* s = R"(x)";', "raw string"),
        ("extern int counter;", "`extern` may only start"),
        ('extern "C" { }', "in front of each kernel"),
        ('extern "C" __global__ void other(int n);', "declared but not defined"),
        ('extern "C" __global__ void other(half n) { }', "has type `half`, which cannot be passed"),
        ('extern "C" __global__ void other(float** n) { }', "pointer to a pointer"),
        ('extern "C" __global__ void other(int n) { }', 'other is `extern "C"` but no launch uses it'),
        ('extern "C" __device__ void other(int n) { }', "not `__global__`"),
        ("__device__ int calls = 1;", "keeps state from call to call"),
        ("__device__ void f() { static int calls; }", "keeps state from call to call"),
    ],
)
def test_the_cuda_source_is_restricted(line: str, message: str) -> None:
    with pytest.raises(KernelSourceError, match=message):
        parse_kernel(with_body(line))


@pytest.mark.parametrize(
    "line",
    [
        "// #include in a comment, asm, extern",
        "constexpr int A = 1'000; __constant__ float table[2] = {1, 2}; __device__ const int b[1] = {0};",
        'static __device__ __forceinline__ float f(float x) { asm volatile(""); return x; }',
        "struct V { float x[4]; __device__ float& operator[](int i) { return x[i]; } };",
        "#define TWICE(x) \\\n    (2 * (x))\n#if VEC > 1\n#endif",
        "template <int N> __device__ void g() {\n#pragma unroll\nfor (int i = 0; i < N; i++) { extern __shared__ int s[]; } }",
    ],
)
def test_ordinary_cuda_code_is_accepted(line: str) -> None:
    parse_kernel(with_body(line))


@pytest.mark.parametrize(
    "before, inside, message",
    [
        ("", 'asm volatile("nop");', "'asm' is not allowed in a CPU kernel"),
        ("", "__builtin_printf(a);", "'__builtin_printf' is not allowed"),
        ("", 'system("ls");', "'system' is not allowed"),
        ("__attribute__((constructor)) void f() {}", "", "'constructor' is not allowed"),
        ("", "std::thread t;", "'thread' is not allowed"),
        ("namespace fs = std::filesystem;", "", "'filesystem' is not allowed"),
        ('extern "C" int open_door(int);', "", "declared but not defined"),
        ("", "write(1, a, 2);", "'write' is not allowed"),
        ("", "\n#pragma omp parallel num_threads(4)\n{}", "num_threads is not allowed"),
        ('#pragma GCC optimize("fast-math")', "", "#pragma GCC optimize"),
    ],
)
def test_the_cpu_source_is_restricted(before: str, inside: str, message: str) -> None:
    with pytest.raises(KernelSourceError, match=message):
        parse_kernel(CPU.format(before, inside))


def test_ordinary_cpu_code_is_accepted() -> None:
    body = "#pragma omp parallel for simd\nfor (int64_t i = 0; i < n; i++) { int read = 1; y[i] = std::exp(a[i]) * read; }"
    parse_kernel(CPU.format("static inline float half_of(float x) { return x / 2; }", "\n" + body))


def test_a_cpu_kernel_is_one_function() -> None:
    text = CPU.format("", "").replace("[[launch]]", '[[launch]]\nkernel = "k"\nargs = ["a", "b", "y", "n"]\n[[launch]]', 1)
    with pytest.raises(KernelSourceError, match="exactly one"):
        parse_kernel(text)


def test_why_not_names_the_first_obstacle() -> None:
    kernel = parse_kernel(file())
    task = tasks.relu_add_task(1024, device="cuda")
    assert kernel.why_not(task) is None
    for other, reason in (
        (tasks.softmax_task(device="cuda"), "implements add.relu, the task is softmax"),
        (tasks.relu_add_task(1024), "written for cuda, the task is on cpu"),
        (tasks.relu_add_task(1024, "bfloat16", "cuda"), "first floating input is bfloat16"),
        (tasks.relu_add_task(4, device="cuda"), "where 'n >= 8' fails: n = 4"),
        (tasks.relu_add_task("d0", device="cuda", hints={"d0": 64}), "static dim n = 'y.numel' depends on a dynamic size"),
    ):
        assert reason in (kernel.why_not(other) or "")


def test_a_kernel_must_take_every_tensor_and_have_every_tensor_it_takes() -> None:
    text = file().replace("add.relu", "layer_norm").replace('"a", "b"', '"x", "weight"')
    kernel = parse_kernel(text)
    assert "task has the tensor bias, which no launch takes" in (kernel.why_not(tasks.layer_norm_task(device="cuda")) or "")
    assert "needs the tensor weight" in (kernel.why_not(tasks.layer_norm_task(device="cuda", weight=False, bias=False)) or "")
    assert kernel.why_not(tasks.layer_norm_task(device="cuda", bias=False)) is None
    optional = parse_kernel(text.replace("where  ", 'optional = ["weight"]\nwhere  '))
    assert optional.why_not(tasks.layer_norm_task(device="cuda", weight=False, bias=False)) is None


def test_an_expression_over_a_parameter_the_task_lacks_is_a_reason() -> None:
    kernel = parse_kernel(edited('"n >= 8"', '"groups == 1"'))
    assert "'groups' has no value here" in (kernel.why_not(tasks.relu_add_task(device="cuda")) or "")


def test_tunings_are_the_combinations_that_satisfy_where() -> None:
    kernel, facts = parse_kernel(file()), facts_for_arch("sm_90a")
    assert len(kernel.tunings(tasks.relu_add_task(1024, device="cuda"), facts)) == 4
    odd = kernel.tunings(tasks.relu_add_task(1023, device="cuda"), facts)
    assert odd == [{"THREADS": 128, "VEC": 1}, {"THREADS": 256, "VEC": 1}]


def test_parsing_a_kernel_does_not_import_torch() -> None:
    code = "import sys, torch_llmkernels.kernels.source, torch_llmkernels.kernels.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
