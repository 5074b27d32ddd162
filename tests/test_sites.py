"""The site grammar: one spelling, there and back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usae_probe.errors import SiteError, nearest
from usae_probe.sites import POLICIES, Site, check_model_name, file_stem

MODELS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,12}", fullmatch=True)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="~#:@/", exclude_categories=("Z", "C")), min_size=1)
NUMBERS = st.none() | st.integers(0, 10**6)


@settings(deadline=None)
@given(
    st.builds(
        Site, model=MODELS, layer=NAMES, call=NUMBERS, element=st.none() | NAMES, head=NUMBERS,
        policy=st.sampled_from(POLICIES),
    )
)  # fmt: skip
def test_what_is_spelled_is_parsed(site: Site) -> None:
    assert Site.parse(str(site)) == site
    assert str(Site.parse(str(site))) == str(site)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vit/blocks.11", Site("vit", "blocks.11")),
        ("vit/blocks.11@patch", Site("vit", "blocks.11", policy="patch")),
        ("m/act~1", Site("m", "act", call=1)),
        ("m/encoder#last_hidden_state", Site("m", "encoder", element="last_hidden_state")),
        ("tl/blocks.5.attn.hook_z:3", Site("tl", "blocks.5.attn.hook_z", head=3)),
        ("m/a.b~2#0:7@mean", Site("m", "a.b", call=2, element="0", head=7, policy="mean")),
        ("r50.v-2_x/layer*.**", Site("r50.v-2_x", "layer*.**")),
    ],
)
def test_the_spellings_of_the_design(text: str, expected: Site) -> None:
    assert Site.parse(text) == expected
    assert str(expected) == text


def test_pool_is_left_out() -> None:
    assert str(Site.parse("vit/blocks.8@pool")) == "vit/blocks.8"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blocks.11", "site 'blocks.11' has no model"),
        ("", "site '' has no model"),
        ("/blocks.11", "model name '' is not usable"),
        ("my vit/blocks.11", "model name 'my vit' is not usable"),
        ("-vit/blocks.11", "model name '-vit' is not usable"),
        ("vit/", "'' is no layer of the form"),
        ("vit/blocks/11", "'blocks/11' is no layer of the form"),
        ("vit/act~", "'act~' is no layer of the form"),
        ("vit/act~x", "'act~x' is no layer of the form"),
        ("vit/a b", "'a b' is no layer of the form"),
        ("vit/z:first", "'z:first' is no layer of the form"),
        ("vit/a@mean~1", "'a@mean~1' is no layer of the form"),  # suffixes in the wrong order
        ("vit/a@mean@cls", "'a@mean@cls' is no layer of the form"),
        ("vit/a@maen", "unknown token policy '@maen' in 'vit/a@maen', expected one of pool, cls, mean, patch, all"),
    ],
)
def test_bad_spellings(text: str, message: str) -> None:
    with pytest.raises(SiteError) as caught:
        Site.parse(text)
    assert message in caught.value.message


def test_a_misspelled_policy_names_the_nearest() -> None:
    with pytest.raises(SiteError) as caught:
        Site.parse("vit/a@maen")
    assert caught.value.hint == "did you mean 'mean'?"


def test_names_for_files() -> None:
    assert file_stem("vit/blocks.11@mean") == "vit__blocks.11@mean"
    check_model_name("resnet18.a1_in1k")
    with pytest.raises(SiteError, match="use letters, digits"):
        check_model_name("..")


def test_nearest() -> None:
    assert nearest("layr4", ["layer4", "layer3", "fc"]) == "did you mean 'layer4' or 'layer3'?"
    assert nearest("x", ["layer4"]) == ""
    assert nearest("abc1", ["abc2", "abc3", "abc4", "abc5"]).count("'abc") == 3
