"""Metrics, intervals and the evaluation of every channel set."""

import json
import math

import numpy as np
import pytest
import timm
import torch
from scipy import stats
from sklearn.metrics import precision_recall_fscore_support
from torch import nn

import timm_varchan
from timm_varchan import ANONYMOUS, RGB, ChannelSet
from timm_varchan.evaluation import (
    METRICS,
    MODES,
    ChannelSetMetrics,
    SetView,
    choose_sets,
    classification_metrics,
    evaluate_channel_sets,
    paired_difference,
    predict_channel_sets,
    summarise_sizes,
    wilson_interval,
)
from timm_varchan.models import has_stems
from timm_varchan.plots import plot_channel_sets, plot_curves

BANDS = ChannelSet.parse("R+G+B+NIR+SWIR1")


def batches(num_images=20, num_channels=3, size=4, batch_size=6, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(num_images, num_channels, size, size, generator=rng)
    y = torch.randint(0, 4, (num_images,), generator=rng)
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))


@pytest.fixture(scope="module")
def twin():
    torch.manual_seed(0)
    model = timm.create_model("dwg_test_resnet", num_classes=4)
    mixer = model.conv1[0].mixer if isinstance(model.conv1, nn.Sequential) else model.conv1.mixer
    with torch.no_grad():
        mixer.out.weight.normal_()
    return model


class Weighted(nn.Module):
    """Class 0 or 1 by the sign of a weighted sum of the planes: order matters, C is fixed."""

    def __init__(self, num_channels):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, num_channels + 1))

    def forward(self, x):
        total = (x.mean((2, 3)) * self.weight).sum(1)
        return torch.stack([total, -total], 1)


def test_metrics_are_those_of_scikit_learn_with_missing_classes():
    rng = np.random.default_rng(0)
    references, predictions = rng.integers(0, 5, 80), rng.integers(0, 6, 80)
    values = ChannelSetMetrics().compute(
        predictions=predictions, references=references, num_classes=7
    )
    expected = precision_recall_fscore_support(
        references, predictions, labels=range(7), average="macro", zero_division=0
    )[:3]
    assert values["accuracy"] == pytest.approx((references == predictions).mean())
    assert [values[name] for name in METRICS[1:]] == pytest.approx(expected)


def test_wilson_interval_is_that_of_scipy_and_holds_the_ends():
    for successes, total in ((0, 9), (9, 9), (17, 450), (300, 450)):
        expected = stats.binomtest(successes, total).proportion_ci(method="wilson")
        assert wilson_interval(successes, total) == pytest.approx(tuple(expected))
    low, high = wilson_interval(9, 9)
    assert low < high == 1.0
    with pytest.raises(ValueError, match="at least one"):
        wilson_interval(0, 0)


def test_intervals_hold_the_estimate_and_shrink_with_more_images():
    rng = np.random.default_rng(1)
    widths = []
    for count in (60, 600):
        references = rng.integers(0, 3, count)
        predictions = np.where(rng.random(count) < 0.7, references, rng.integers(0, 3, count))
        metrics = classification_metrics(predictions, references, 3)
        assert tuple(metrics) == METRICS
        assert all(m.low <= m.value <= m.high for m in metrics.values())
        assert classification_metrics(predictions, references, 3) == metrics
        widths.append([m.high - m.low for m in metrics.values()])
    assert all(2 < few / many < 5 for few, many in zip(*widths, strict=True))


def test_a_perfect_classifier_has_perfect_metrics():
    metrics = classification_metrics([0, 1, 2], [0, 1, 2], 3)
    assert all(metric.value == metric.high == 1.0 for metric in metrics.values())


@pytest.mark.parametrize(
    ("predictions", "references"), [([], []), ([0], [0, 1]), ([5], [0]), ([-1], [0])]
)
def test_wrong_predictions_are_refused(predictions, references):
    with pytest.raises(ValueError, match=r"labels|classes"):
        classification_metrics(predictions, references, 3)


def test_paired_difference_is_the_exact_mcnemar_test():
    a = np.array([True] * 30 + [True] * 12 + [False] * 3 + [False] * 5)
    b = np.array([True] * 30 + [False] * 12 + [True] * 3 + [False] * 5)
    result = paired_difference(a, b)
    assert result.difference == pytest.approx(9 / 50)
    assert result.p == pytest.approx(stats.binomtest(3, 15).pvalue)
    assert 0 < result.low < result.difference < result.high < 0.36
    same = paired_difference(a, a)
    assert (same.difference, same.p) == (0.0, 1.0)
    assert same.low < 0 < same.high
    swapped = paired_difference(b, a)
    assert (swapped.low, swapped.high) == pytest.approx((-result.high, -result.low))
    with pytest.raises(ValueError, match="paired"):
        paired_difference(a, b[1:])


def test_every_subset_up_to_a_number_then_a_sample_of_each_size():
    assert len(choose_sets(RGB)) == 7
    assert choose_sets(RGB)[0] == (0, 1, 2)
    many = ChannelSet.anonymous(40)
    chosen = choose_sets(many, max_sets=80)
    sizes = [len(indices) for indices in chosen]
    assert sizes.count(40) == 1
    assert all(sizes.count(size) == 2 for size in range(1, 40))
    assert len(set(chosen)) == len(chosen)
    assert chosen == choose_sets(many, max_sets=80) != choose_sets(many, max_sets=80, seed=1)
    with pytest.raises(ValueError, match="allow 3 or more"):
        choose_sets(RGB, max_sets=2)


def test_shuffled_planes_depend_on_the_place_in_the_data_not_on_the_batch():
    x = torch.arange(8.0)[:, None, None, None] * 10 + torch.arange(5.0)[:, None, None]
    view = SetView(BANDS, (0, 2, 4), "anonymous", "shuffled")
    whole = view.planes(x, range(8))
    parts = torch.cat([view.planes(x[:3], range(3)), view.planes(x[3:], range(3, 8))])
    assert torch.equal(whole, parts)
    assert torch.equal(whole.sort(1).values, x[:, (0, 2, 4)])
    assert len({tuple(row) for row in (whole.flatten(1) % 10).tolist()}) > 1
    assert torch.equal(SetView(BANDS, (1, 3), "named", "in order").planes(x, range(8)), x[:, 1:4:2])


def test_mask_zeroes_absent_channels_and_scales_the_rest():
    seen = []

    class Recorder(Weighted):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    x = torch.randn(2, 3, 2, 2)
    MODES["mask"](Recorder(3), x, SetView(RGB, (0, 2), "mask", "in order"), range(2))
    assert torch.equal(seen[0][:, 1], torch.zeros(2, 2, 2))
    assert torch.equal(seen[0][:, [0, 2]], 1.5 * x[:, [0, 2]])


def test_results_are_those_of_separate_runs_and_the_model_stays_as_it_was(twin):
    twin.train()
    timm_varchan.set_channels(twin, "RG")
    loader = batches(size=32)
    results = evaluate_channel_sets(twin, loader, RGB, num_classes=4)
    assert twin.training
    assert str(twin.conv1[0].mixer.channels if isinstance(twin.conv1, nn.Sequential)
               else twin.conv1.mixer.channels) == "RG"  # fmt: skip
    assert len(results) == 7 * 2 * 2
    twin.eval()
    for result in results:
        assert result.num_images == 20
        told = RGB.take(result.indices) if result.mode == "named" else ANONYMOUS
        timm_varchan.set_channels(twin, told)
        with torch.no_grad():
            expected = torch.cat([twin(x[:, result.indices]).argmax(1) for x, _ in loader])
        # A DWG stem does not depend on the order, named or not.
        assert result.predictions.tolist() == expected.tolist()
        assert json.loads(json.dumps(result.to_json()))["accuracy"]["value"] == pytest.approx(
            result.correct.mean()
        )
    timm_varchan.set_channels(twin, None)


def test_a_model_of_fixed_count_is_masked_and_feels_the_order():
    model = Weighted(5)
    assert not has_stems(model)
    loader = batches(num_images=60, num_channels=5)
    results = evaluate_channel_sets(model, loader, BANDS, num_classes=4)
    assert {result.mode for result in results} == {"mask"}
    whole, shuffled = results[:2]
    assert (whole.order, shuffled.order) == ("in order", "shuffled")
    assert whole.predictions.tolist() != shuffled.predictions.tolist()
    single = [r for r in results if r.size == 1]
    assert single[0].predictions.tolist() == single[1].predictions.tolist()


def test_statistics_of_a_set_are_used_for_that_set_alone(twin):
    loader = batches(size=32)
    own = timm_varchan.channel_statistics(twin, [x[:, :2] * 3 for x, _ in loader], "RG")
    views = [SetView(RGB, i, "named", "in order") for i in ((0, 1), (0, 2))]
    plain, _ = predict_channel_sets(twin, loader, views)
    with_own, _ = predict_channel_sets(twin, loader, views, statistics={("RG", "named"): own})
    assert plain[:, 1].tolist() == with_own[:, 1].tolist()
    twin.eval()
    shared = timm_varchan.share(twin, "RG", statistics=own).eval()
    with torch.no_grad():
        expected = torch.cat([shared(x[:, :2]).argmax(1) for x, _ in loader])
    assert with_own[:, 0].tolist() == expected.tolist()


def test_channels_without_identity_are_only_evaluated_anonymously(twin):
    results = evaluate_channel_sets(
        twin, batches(6, size=32), ChannelSet.anonymous(3), num_classes=4, orders=["in order"]
    )
    assert {result.mode for result in results} == {"anonymous"}


def test_errors_say_what_there_is(twin):
    with pytest.raises(ValueError, match=r"mode \['guessed'\].*named, anonymous, mask"):
        evaluate_channel_sets(twin, batches(), RGB, num_classes=4, modes=["guessed"])
    with pytest.raises(ValueError, match="order"):
        evaluate_channel_sets(twin, batches(), RGB, num_classes=4, orders=["sorted"])
    with pytest.raises(ValueError, match="loader is empty"):
        evaluate_channel_sets(twin, [], RGB, num_classes=4)


def test_sizes_are_summarised_over_their_sets():
    results = evaluate_channel_sets(Weighted(3), batches(), RGB, num_classes=4, orders=["in order"])
    summaries = summarise_sizes(results)
    assert [(s.size, s.num_sets) for s in summaries] == [(3, 1), (2, 3), (1, 3)]
    pairs = [r.metrics["accuracy"].value for r in results if r.size == 2]
    assert summaries[1].mean == pytest.approx(np.mean(pairs))
    assert summaries[1].std == pytest.approx(np.std(pairs))
    assert summaries[1].worst == min(pairs)


def test_pictures_are_drawn_for_few_and_many_sets(tmp_path):
    few = evaluate_channel_sets(Weighted(3), batches(), RGB, num_classes=4)
    channels = ChannelSet.anonymous(6)
    loader = batches(num_channels=6)
    many = evaluate_channel_sets(Weighted(6), loader, channels, num_classes=4, orders=["in order"])
    history = [
        {"epoch": e, "train_loss": 2 / (e + 1), "eval_loss": math.nan, "train_accuracy": 0.1 * e,
         "eval_accuracy": 0.2} for e in range(3)
    ]  # fmt: skip
    pictures = [
        plot_channel_sets(few, tmp_path / "few.png", "title"),
        plot_channel_sets(many, tmp_path / "many.png"),
        plot_curves(history, tmp_path / "curves.png"),
    ]
    for path in pictures:
        assert path.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="no channel sets"):
        plot_channel_sets([], tmp_path / "x.png")
    with pytest.raises(ValueError, match="no epochs"):
        plot_curves([], tmp_path / "x.png")
