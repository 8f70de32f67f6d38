"""Architectures: name -> builder, one explicit table; each takes any number of channels and gives one map of logits.

A network with pre and post channels side by side in its stack is early fusion: every plain row of the table is that.
The rows `*-siamese` read the two sides apart.
Axes: b batch, c channel, y row, x column.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from slidecube.models.errors import ModelError
from slidecube.models.network_card import Argument

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One row of the table.

    build : (channels, **arguments) -> module with fresh weights, (b, c, y, x) float32 -> (b, 1, y, x) logits, of sides
        of any length
    multiple_px : sides that are no multiple of it are padded inside; windows should be one
    arguments : that a user may set, with their defaults
    global_context : it pools over the whole window, on which every pixel then depends
    siamese : it wants the indices of the channels before and after, see `complete_arguments`
    extra : it needs `pip install slidecube[nets]`
    source : paper
    """

    build: Callable[..., nn.Module]
    multiple_px: int = 32
    arguments: Mapping[str, Argument] = field(default_factory=dict)
    global_context: bool = False
    siamese: bool = False
    extra: bool = True
    source: str


def _smp(kind: str, settings: Callable[..., Mapping[str, Any]]) -> Callable[..., nn.Module]:
    def build(channels: int, *, encoder: str, **arguments: Any) -> nn.Module:
        from slidecube.models.nets import segmentation  # noqa: PLC0415  torch is slow to import

        return segmentation.build(kind, channels, encoder=encoder, **settings(**arguments))

    return build


def _unet_settings(*, width: int, depth: int) -> Mapping[str, Any]:
    return {"encoder_depth": depth, "decoder_channels": [width * 2**i for i in reversed(range(depth))]}


def _scse_settings(*, width: int, depth: int, attention: bool) -> Mapping[str, Any]:
    return {
        **_unet_settings(width=width, depth=depth),
        "decoder_attention_type": "scse" if attention else None,
    }


def _resunet(channels: int, *, width: int, depth: int) -> nn.Module:
    from slidecube.models.nets.resunet import ResUnet  # noqa: PLC0415  torch is slow to import

    return ResUnet(channels, width=width, depth=depth)


def _siamese(plain: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def build(channels: int, *, pre: str, post: str, **arguments: Argument) -> nn.Module:
        from slidecube.models.nets.siamese import Siamese  # noqa: PLC0415  torch is slow to import

        before, after = _indices("pre", pre, channels), _indices("post", post, channels)
        if len(before) != len(after) or set(before) & set(after):
            raise ModelError(
                f"pre = {pre!r} and post = {post!r} are no pairs of channels: as many of each, none in both"
            )
        network = plain(channels - len(before), **arguments)
        return Siamese(network, channels, pre=before, post=after)

    return build


def _indices(key: str, text: str, channels: int) -> list[int]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise ModelError(f"{key} = {text!r} is no list of channels; one looks like '0,2,4'")
    indices = [int(part) for part in parts]
    if len(set(indices)) < len(indices) or max(indices) >= channels:
        raise ModelError(f"{key} = {text!r} names a channel twice, or one of {channels} that is not there")
    return indices


_ENCODER: Mapping[str, Argument] = {"encoder": "resnet18"}
_UNET: Mapping[str, Argument] = {**_ENCODER, "width": 16, "depth": 5}
_RESUNET: Mapping[str, Argument] = {"width": 16, "depth": 3}
_SIDES: Mapping[str, Argument] = {"pre": "", "post": ""}
_U_NET = _smp("Unet", _scse_settings)

ARCHITECTURES: Mapping[str, Architecture] = {
    "resunet": Architecture(
        build=_resunet,
        multiple_px=8,  # of its default depth
        arguments=_RESUNET,
        extra=False,
        source="Zhang, Liu & Wang 2018, Road extraction by deep residual U-Net",
    ),
    "unet": Architecture(
        build=_U_NET,
        arguments={**_UNET, "attention": False},
        source="Ronneberger, Fischer & Brox 2015, U-Net; attention: Roy, Navab & Wachinger 2018, scSE",
    ),
    "unetplusplus": Architecture(
        build=_smp("UnetPlusPlus", _scse_settings),
        arguments={**_UNET, "attention": False},
        source="Zhou et al. 2018, UNet++",
    ),
    "manet": Architecture(
        build=_smp("MAnet", _unet_settings),
        arguments=_UNET,
        global_context=True,
        source="Fan et al. 2020, MA-Net",
    ),
    "linknet": Architecture(
        build=_smp("Linknet", lambda *, depth: {"encoder_depth": depth}),
        arguments={**_ENCODER, "depth": 5},
        source="Chaurasia & Culurciello 2017, LinkNet",
    ),
    "fpn": Architecture(
        build=_smp(
            "FPN",
            lambda *, width: {"decoder_pyramid_channels": 2 * width, "decoder_segmentation_channels": width},
        ),
        arguments={**_ENCODER, "width": 128},
        source="Lin et al. 2017, Feature pyramid networks; Kirillov et al. 2017",
    ),
    "pspnet": Architecture(
        build=_smp(
            "PSPNet",
            lambda *, width, depth: {
                "psp_out_channels": width,
                "encoder_depth": depth,
                "upsampling": 2**depth,
            },
        ),
        arguments={**_ENCODER, "width": 512, "depth": 3},
        global_context=True,
        source="Zhao et al. 2017, Pyramid scene parsing network",
    ),
    "pan": Architecture(
        build=_smp("PAN", lambda *, width: {"decoder_channels": width}),
        arguments={**_ENCODER, "width": 32},
        global_context=True,
        source="Li et al. 2018, Pyramid attention network",
    ),
    "deeplabv3": Architecture(
        build=_smp(
            "DeepLabV3",
            lambda *, width, stride: {"decoder_channels": width, "encoder_output_stride": stride},
        ),
        arguments={**_ENCODER, "width": 256, "stride": 8},
        global_context=True,
        source="Chen et al. 2017, Rethinking atrous convolution",
    ),
    "deeplabv3plus": Architecture(
        build=_smp(
            "DeepLabV3Plus",
            lambda *, width, stride: {"decoder_channels": width, "encoder_output_stride": stride},
        ),
        arguments={**_ENCODER, "width": 256, "stride": 16},
        global_context=True,
        source="Chen et al. 2018, Encoder-decoder with atrous separable convolution",
    ),
    "segformer": Architecture(
        build=_smp("Segformer", lambda *, width: {"decoder_segmentation_channels": width}),
        arguments={"encoder": "mit_b0", "width": 256},
        global_context=True,
        source="Xie et al. 2021, SegFormer",
    ),
    "upernet": Architecture(
        build=_smp("UPerNet", lambda *, width: {"decoder_channels": width}),
        arguments={**_ENCODER, "width": 256},
        global_context=True,
        source="Xiao et al. 2018, Unified perceptual parsing",
    ),
    "unet-siamese": Architecture(
        build=_siamese(_U_NET),
        arguments={**_UNET, "attention": False, **_SIDES},
        siamese=True,
        source="Daudt, Le Saux & Boulch 2018, FC-Siam-diff",
    ),
    "resunet-siamese": Architecture(
        build=_siamese(_resunet),
        multiple_px=8,
        arguments={**_RESUNET, **_SIDES},
        siamese=True,
        extra=False,
        source="Daudt, Le Saux & Boulch 2018, FC-Siam-diff, over Zhang, Liu & Wang 2018",
    ),
}
"""The nine of Ganeroed et al. 2023, the best of Landslide4Sense, two with transformers' encoders in mind, and two that
read before and after apart."""


def check_arguments(name: str, arguments: Mapping[str, Argument] | None = None) -> dict[str, Argument]:
    """Return an architecture's arguments, defaults filled in; imports no torch.

    Raises ModelError for an unknown architecture or argument, with near matches, and for one of another type.
    """
    if name not in ARCHITECTURES:
        raise ModelError(f"No architecture {name!r}{_near(name, ARCHITECTURES)}; {_all(ARCHITECTURES)}")
    defaults = ARCHITECTURES[name].arguments
    for key, value in (arguments or {}).items():
        if key not in defaults:
            raise ModelError(f"{name} has no argument {key!r}{_near(key, defaults)}; {_all(defaults)}")
        wanted = type(defaults[key])
        if type(value) is not wanted:
            raise ModelError(f"{name}: {key} = {value!r} is no {wanted.__name__}")
        if wanted is int and value < 1:  # type: ignore[operator]  # an int by the line before
            raise ModelError(f"{name}: {key} = {value!r} is below 1")
    return {**defaults, **(arguments or {})}


def libraries_of(name: str) -> dict[str, str]:
    """Return the versions of the libraries that compute an architecture, "" = not installed; imports none of them.

    What it was built for ("+cpu", "+cu128") is left out: that is of the machine.
    """
    wanted = ("torch", "segmentation-models-pytorch", "timm") if ARCHITECTURES[name].extra else ("torch",)
    return {library: _version(library) for library in wanted}


def _version(library: str) -> str:
    try:
        return metadata.version(library).partition("+")[0]
    except metadata.PackageNotFoundError:
        return ""


def build_network(name: str, channels: int, arguments: Mapping[str, Argument] | None = None) -> nn.Module:
    """Build a network with fresh weights; the caller seeds torch.

    Raises ModelError for an unknown name, unknown arguments, or channels that it cannot take.
    """
    complete = check_arguments(name, arguments)
    if channels < 1:
        raise ModelError(f"{name} cannot be built for {channels} channels; one is the least")
    return ARCHITECTURES[name].build(channels, **complete)


def stride_px(name: str, arguments: Mapping[str, Argument]) -> int:
    """Side of the pixels of an architecture's coarsest map, in pixels of its input; arguments : complete ones."""
    if "stride" in arguments:
        return int(arguments["stride"])
    return 2 ** int(arguments["depth"]) if "depth" in arguments else ARCHITECTURES[name].multiple_px


def check_stride(name: str, arguments: Mapping[str, Argument], px: int) -> None:
    """Raise ModelError where patches are smaller than one pixel of an architecture's coarsest map."""
    stride = stride_px(name, arguments)
    if stride > px:
        what = f"depth = {arguments['depth']}" if "depth" in arguments else f"{name}"
        raise ModelError(
            f"network.arguments: {what} halves down to steps of {stride} px, and patches have px = {px}; lower depth, "
            f"or raise px in [patches] to {stride} or more"
        )


def pre_post_pairs(names: Sequence[str]) -> list[tuple[int, int]]:
    """Find the channels before and after of the same thing: names `<thing>_pre` and `<thing>_post`.

    Returns indices (pre, post), in order of the first. Raises ModelError where there is none.
    """
    place = {name: index for index, name in enumerate(names)}
    pairs = [
        (index, place[f"{name.removesuffix('_pre')}_post"])
        for index, name in enumerate(names)
        if name.endswith("_pre") and f"{name.removesuffix('_pre')}_post" in place
    ]
    if not pairs:
        raise ModelError(
            f"A siamese network needs features before and after, such as B04_pre and B04_post; got {', '.join(names)}"
        )
    return pairs


def complete_arguments(
    name: str, features: Sequence[str], arguments: Mapping[str, Argument] | None = None
) -> dict[str, Argument]:
    """Return the arguments that belong into a card: defaults, the user's own, and which channels are pre and post.

    Raises ModelError as `check_arguments`, and where a siamese network's features hold no pairs.
    """
    complete = check_arguments(name, arguments)
    if ARCHITECTURES[name].siamese and not (complete["pre"] or complete["post"]):
        pairs = pre_post_pairs(features)
        complete["pre"] = ",".join(str(pre) for pre, _ in pairs)
        complete["post"] = ",".join(str(post) for _, post in pairs)
    return complete


def _near(name: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _all(known: Mapping[str, object]) -> str:
    return f"there are: {', '.join(known)}"
