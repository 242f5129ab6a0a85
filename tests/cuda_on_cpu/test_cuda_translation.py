"""The translation of CUDA sources: lines keep their numbers, and what it does not know is refused."""

from pathlib import Path

import pytest
from cuda_translation import TranslationError, translate
from repository import REPOSITORY

SOURCES = sorted((REPOSITORY / "kernels" / "csrc" / "cuda").iterdir())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_lines_keep_their_numbers(path: Path) -> None:
    source = path.read_text()
    first, *lines = translate(source, "/a/b.cu").splitlines()
    assert first == '#line 1 "/a/b.cu"'
    assert len(lines) == len(source.splitlines())
    kept = [ours == theirs for ours, theirs in zip(lines, source.splitlines(), strict=True)]
    assert sum(kept) > 0.9 * len(kept)


def test_launches_and_shared_variables_are_translated() -> None:
    text = translate(
        "__global__ void __launch_bounds__(kMost, 2) f(int n) {\n  __shared__ int a[3], b;\n}\n"
        "void g() { f<<<h(1, 2), 32, 4 * n, stream>>>(5); }\n",
        "a.cu",
    )
    assert '::emulation::Launch{"f", kMost, static_cast<int64_t>(h(1, 2)), static_cast<int64_t>(32), ' in text
    assert "static_cast<int64_t>(4 * n)}([](auto... arguments) { f(arguments...); }, 5);" in text
    assert 'SharedVariable a_storage("a", sizeof(a_type))' in text
    assert "using b_type = int ;" in text


@pytest.mark.parametrize(
    "line",
    [
        'asm("bar.sync 1;");',
        "__shared__ int a[3] = {};",
        "__constant__ int table[3];",
        "cudaMemcpyAsync(a, b, 3);",
        "__threadfence();",
    ],
)
def test_what_it_does_not_know_is_refused_with_its_line(line: str) -> None:
    with pytest.raises(TranslationError, match=r"the emulation does not know this"):
        translate(f"// a comment\n{line}\n", "a.cu")
