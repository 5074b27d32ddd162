"""What keeps a training from learning its rows by heart: by hand, and in the parts of a training it reaches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from usae_probe.buffer import ActivationBuffer
from usae_probe.config import TrainConfig, UsaeConfig
from usae_probe.errors import ConfigError
from usae_probe.usae import train, usae_for
from usae_probe.usae.regularisation import regularisation
from usae_probe.usae.start import engine

D_IN = {"m/a": 40, "n/b": 10}
AUTO = {"weight_decay": "auto", "latent_dropout": "auto"}


@pytest.fixture
def buffer(tmp_path: Path) -> ActivationBuffer:
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(500, 6))
    arrays = {site: shared @ rng.normal(size=(6, d)) + 0.5 * rng.normal(size=(500, d)) for site, d in D_IN.items()}
    return ActivationBuffer.from_arrays(arrays, tmp_path / "acts", dtype="float32")


def test_auto_by_hand() -> None:
    # 500 rows. 40 dimensions: 60 · 40 / 500 = 4.8; 10 dimensions: 60 · .02 = 1.2; of 25 in the mean: 3.4 · .05 = .17
    found = regularisation(TrainConfig.model_validate(AUTO), D_IN, 500)
    assert found.decay == pytest.approx({"m/a": 4.8, "n/b": 1.2})
    assert found.dropout == pytest.approx(0.17)
    assert found == regularisation(TrainConfig(), D_IN, 500)  # the default
    alone = regularisation(TrainConfig(), {"n/b": 10}, 500)
    assert alone.decay == pytest.approx({"n/b": 1.2})
    assert alone.dropout == pytest.approx(3.4 * 0.02)
    assert regularisation(TrainConfig(), D_IN, 20).dropout == 0.35  # at most
    many = regularisation(TrainConfig(), D_IN, 10**9)
    assert max(*many.decay.values(), many.dropout) < 1e-5  # it fades where rows are plenty


def test_auto_never_takes_more_than_a_fifth_of_an_encoder_in_a_step() -> None:
    """With 33 rows of 768 dimensions 60 d / n = 1,396: times lr = .003 it would throw the encoder four times over."""
    found = regularisation(TrainConfig(), {"vit/x": 768}, 33)
    assert found.decay["vit/x"] == pytest.approx(0.2 / 0.003)
    assert regularisation(TrainConfig(lr=0.1), {"vit/x": 768}, 33).decay["vit/x"] == pytest.approx(2.0)


def test_few_rows_of_many_dimensions_are_trained_on(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    arrays = {site: draw.normal(size=(40, d)).astype(np.float32) for site, d in (("a/x", 768), ("b/y", 512))}
    buffer = ActivationBuffer.from_arrays(arrays, out=tmp_path / "few")
    run = train(buffer, n_latents=64, k=4, steps=60)
    assert max(float(encoder.detach().norm(dim=1).max()) for encoder in run.usae.W_enc) < 10


def test_numbers_hold_for_all_sites() -> None:
    found = regularisation(TrainConfig(weight_decay=2.0, latent_dropout=0.1), D_IN, 200)
    assert found == ({"m/a": 2.0, "n/b": 2.0}, 0.1)
    none = regularisation(TrainConfig(weight_decay=0.0, latent_dropout=0.0), D_IN, 200)
    assert none == ({"m/a": 0.0, "n/b": 0.0}, 0.0)


def test_a_training_gets_them_by_its_training_rows(buffer: ActivationBuffer) -> None:
    how = TrainConfig.model_validate(AUTO)
    usae = usae_for(buffer, UsaeConfig(n_latents=32, k=4), how)
    expected = regularisation(how, D_IN, buffer.n_rows("train"))
    objective, optimiser = engine(usae, how, buffer.n_rows("train"))
    assert objective.dropout == expected.dropout
    assert optimiser._decay == {"W_enc.0": expected.decay["m/a"], "W_enc.1": expected.decay["n/b"]}


@pytest.mark.usefixtures("one_thread")
def test_auto_equals_the_numbers_it_stands_for(buffer: ActivationBuffer) -> None:
    settings = {"n_latents": 32, "k": 4, "steps": 12, "batch_size": 64, "sites": ["m/a"]}
    numbers = regularisation(TrainConfig.model_validate(AUTO), {"m/a": D_IN["m/a"]}, buffer.n_rows("train"))
    auto = train(buffer, **settings, **AUTO).usae
    given = train(buffer, **settings, weight_decay=numbers.decay["m/a"], latent_dropout=numbers.dropout).usae
    assert all(torch.equal(a, b) for a, b in zip(auto.state_dict().values(), given.state_dict().values(), strict=True))
    plain = train(buffer, **settings, weight_decay=0.0, latent_dropout=0.0).usae
    assert auto.W_enc[0].norm() < plain.W_enc[0].norm()


def test_the_published_recipe_has_its_own(buffer: ActivationBuffer) -> None:
    how = TrainConfig.model_validate({"recipe": "published", **AUTO})
    assert (how.weight_decay, how.latent_dropout) == (1e-5, 0.0)
    with pytest.raises(ConfigError, match=r"latent_dropout = 0\.1 contradicts recipe = 'published'"):
        train(buffer, recipe="published", latent_dropout=0.1, steps=1)


@pytest.mark.parametrize(("key", "value"), [("weight_decay", -1.0), ("weight_decay", "much"), ("latent_dropout", 1.0)])
def test_other_values_are_refused(buffer: ActivationBuffer, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"train\.{key}|{key}"):
        train(buffer, steps=1, **{key: value})
