"""Translation of CUDA sources to C++ for the emulation. Lines keep their numbers, and what is unknown is refused."""

import re

_DECLARATOR = re.compile(r"\s*(\w+)\s*((?:\[[^\]]*\])*)\s*$")
_KNOWN_ASSEMBLY = re.compile(r"asm\(\"ex2\.approx\.ftz\.f32 %0, %1;\" : \"=f\"\((\w+)\) : \"f\"\((.*)\)\);")
_BOUNDS = re.compile(r"__global__\s+void\s+__launch_bounds__\((\w+)(?:,[^)]*)?\)\s+(\w+)\s*\(")
_LAUNCH = re.compile(r"(\w+)<<<(.*?)>>>\(", flags=re.DOTALL)
_DYNAMIC = re.compile(r"extern\s+__shared__\s+([\w:]+)\s+(\w+)\[\];")
_SHARED = re.compile(r"__shared__\s+([\w:]+)\s+([^;]+);")
_LEFT_OVER = ("__shared__", "<<<", "asm(", "__constant__", "__managed__", "cudaMalloc", "cudaMemcpy", "__threadfence")


class TranslationError(ValueError):
    """A source with something that the emulation does not know. The message names file, line and what it is."""


def translate(source: str, path: str) -> str:
    """C++ for include/cuda_runtime.h. path: of the source, for the compiler's and the detectors' messages.

    Raises TranslationError.
    """
    bounds = {name: limit for limit, name in _BOUNDS.findall(source)}
    text = _DYNAMIC.sub(r"\1* const \2 = static_cast<\1*>(::emulation::dynamic_shared_memory());", source)
    text = _SHARED.sub(lambda match: _shared_variables(match[1], match[2]), text)
    text = _KNOWN_ASSEMBLY.sub(r"\1 = ::emulation::ex2_approx_ftz(\2);", text)
    text = re.sub(r"^#pragma unroll.*$", "", text, flags=re.MULTILINE)
    text = text.replace("TORCH_LIBRARY_IMPL(ssd_fast, CUDA, ", "TORCH_LIBRARY_IMPL(ssd_fast, CPU, ")
    text = _LAUNCH.sub(lambda match: _launch(match[1], match[2], bounds.get(match[1], "0")), text)
    for number, line in enumerate(text.splitlines(), start=1):
        code = line.partition("//")[0]
        for word in _LEFT_OVER:
            if word in code:
                raise TranslationError(f"{path}:{number}: {word}: the emulation does not know this: {code.strip()}")
    return f'#line 1 "{path}"\n{text}'


def _shared_variables(base: str, declarators: str) -> str:
    """`__shared__ T a[N], b;`: references to storage of the block that runs."""
    parts = []
    for declarator in declarators.split(","):
        match = _DECLARATOR.match(declarator)
        if not match:
            raise TranslationError(f"__shared__ {base} {declarators}: the emulation does not know this")
        name, extent = match.groups()
        parts.append(
            f"using {name}_type = {base} {extent}; "
            f'static ::emulation::SharedVariable {name}_storage("{name}", sizeof({name}_type)); '
            f"{name}_type& {name} = *static_cast<{name}_type*>({name}_storage.get());"
        )
    return " ".join(parts)


def _launch(name: str, configuration: str, bound: str) -> str:
    """`name<<<blocks, threads, bytes, stream>>>(`: a call of an object that runs the blocks."""
    blocks, threads, *rest = _split(configuration)
    members = [f'"{name}"', bound, *(f"static_cast<int64_t>({value})" for value in (blocks, threads, *rest[:1]))]
    call = f"[](auto... arguments) {{ {name}(arguments...); }}, "
    return f"::emulation::Launch{{{', '.join(members)}}}({call}"


def _split(text: str) -> list[str]:
    """The parts between commas that are not within brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]
