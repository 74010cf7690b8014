"""Metrics, intervals and the evaluation of every channel set."""

import collections
import functools
import json
import math
import re

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
    NO_CLASS,
    ORDERS,
    ChannelSetMetrics,
    Predictions,
    SetView,
    class_counts,
    classification_metrics,
    compare_predictions,
    confusion_cells,
    evaluate,
    evaluate_channel_sets,
    foretold,
    paired_difference,
    plan_sets,
    predict_channel_sets,
    rank_bands,
    robustness,
    set_label,
    smallest_difference,
    summarise_sizes,
    validate_channel_sets,
    wilson_interval,
)
from timm_varchan.models import has_stems

BANDS = ChannelSet.parse("R+G+B+NIR+SWIR1")
FOUR = ChannelSet.parse("R+G+B+NIR")
EUROSAT = ChannelSet.parse("eurosat")


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
    assert tuple(values) == METRICS
    low, high = wilson_interval(9, 9)
    assert low < high == 1.0
    assert values["accuracy"].value == pytest.approx((references == predictions).mean())
    assert [values[name].value for name in METRICS[1:]] == pytest.approx(expected)
    assert all(one.low <= one.value <= one.high for one in values.values())


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


def test_paired_difference_takes_shares_of_several_sets():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, (2, 5, 200)).astype(bool)
    one, same = paired_difference(a[0], b[0]), paired_difference(a[:1].mean(0), b[:1].mean(0))
    assert one == same, "one set is no mean"
    shares = paired_difference(a.mean(0), b.mean(0))
    assert shares.difference == pytest.approx(a.mean() - b.mean())
    assert shares.high - shares.low < 0.7 * (one.high - one.low)
    assert shares.p == pytest.approx(stats.ttest_rel(a.mean(0), b.mean(0)).pvalue, abs=0.02)
    # The interval covers: means of five sets whose images are right with the same probability.
    covered = 0
    for _ in range(400):
        x, y = rng.random((2, 5, 100)) < rng.random(100)
        found = paired_difference(x.mean(0), y.mean(0))
        covered += found.low <= 0 <= found.high
    assert 0.92 < covered / 400 < 0.99
    with pytest.raises(ValueError, match=r"in 0\.\.1"):
        paired_difference([50.0, 0.0], [0.0, 1.0])


def test_no_answer_is_wrong_for_every_class():
    references = np.array([0, 0, 1, 1])
    metrics = classification_metrics([NO_CLASS, 0, NO_CLASS, 1], references, 2)
    assert metrics["accuracy"].value == 0.5
    assert metrics["recall_macro"].value == 0.5
    assert metrics["precision_macro"].value == 1.0  # of those that have an answer
    nothing = classification_metrics([NO_CLASS] * 4, references, 2)
    assert [m.value for m in nothing.values()] == [0.0] * 4
    cells = confusion_cells(np.array([NO_CLASS, 0, NO_CLASS, 1]), references, 2).tolist()
    assert cells == [[0, 0, 1], [0, 2, 1], [1, 1, 1], [1, 2, 1]]
    first, second = class_counts(cells, ["a", "b"])
    assert first == ("a", 2, 1, 1, "no answer (1)")
    assert second == ("b", 2, 1, 1, "no answer (1)")


# ---- which sets


@pytest.mark.parametrize("number", [1, 2, 7, 26, 130])
def test_a_number_of_sets_is_that_number_and_holds_all_channels(number):
    plan = plan_sets(EUROSAT, number)
    assert len(plan) == len({one.indices for one in plan}) == number
    assert plan[0].kind == "all"
    assert plan == plan_sets(EUROSAT, str(number))


@pytest.mark.parametrize("spec", ["eurosat", "sentinel2-l2a", "landsat8", "planetscope-8b", "naip"])
def test_the_default_sets_answer_questions_within_a_budget(spec):
    channels = ChannelSet.parse(spec)
    plan = plan_sets(channels)
    count = len(channels)
    found = {one.indices: one for one in plan}
    assert len(plan) == len(found) <= 40
    assert plan[0].indices == tuple(range(count))
    assert {(i,) for i in range(count)} <= set(found)
    assert {tuple(j for j in range(count) if j != i) for i in range(count)} <= set(found)
    assert {len(indices) for indices in found} == set(range(1, count + 1))
    assert "RGB" in {one.name for one in plan}
    assert plan == plan_sets(channels)


def test_natural_sets_and_names_of_sets():
    named = {one.name: one for one in plan_sets(EUROSAT)}
    assert EUROSAT.take(named["RGB"].indices).names == ("B02", "B03", "B04")
    assert EUROSAT.take(named["RGB+NIR"].indices).names == ("B02", "B03", "B04", "B08")
    assert set(EUROSAT.take(named["Landsat-bands"].indices).names) == {
        "B01", "B02", "B03", "B04", "B8A", "B11", "B12"
    }  # fmt: skip
    assert named["without B10"].indices == tuple(i for i in range(13) if i != 9)
    assert named["all 13"].kind == "all"
    few = plan_sets(RGB)
    assert [one.name for one in few] == ["RGB", "RG", "RB", "GB", "R", "G", "B"]


def test_sets_that_somebody_asks_for():
    plan = plan_sets(EUROSAT, "RGB,B08 B04+B12", also=[(0, 1)])
    assert [one.name for one in plan] == ["all 13", "RGB", "B01+B02", "B04+B12", "B08"]
    assert {one.kind for one in plan[1:]} == {"asked"}
    assert len(plan_sets(RGB, "all")) == 7
    larger = collections.Counter(one.kind for one in plan_sets(EUROSAT, 130))
    assert larger == {"all": 1, "single": 13, "without": 13, "natural": 3, "sample": 100}
    own = ChannelSet.parse([timm_varchan.Channel("DNA"), timm_varchan.Channel("RNA"), 500.0])
    assert [one.name for one in plan_sets(own, "DNA+RNA,500nm")][1:] == ["DNA+RNA", "500nm"]
    with pytest.raises(ValueError, match="B13"):
        plan_sets(EUROSAT, "B13")
    with pytest.raises(ValueError, match="is not among"):
        plan_sets(RGB, "B08")
    with pytest.raises(ValueError, match="subsets"):
        plan_sets(ChannelSet.anonymous(23), "all")
    with pytest.raises(ValueError, match="No channel set"):
        plan_sets(RGB, ",")


def test_hundreds_of_channels_keep_the_budget():
    plan = plan_sets(ChannelSet.anonymous(224))
    assert len(plan) == 40
    assert {one.kind for one in plan} == {"all", "single", "without", "sample"}


@pytest.mark.parametrize("spec", [[None] * 4, [500.0, 500.0, 600.0], [None, 500.0, None, 500.0]])
def test_every_set_has_a_text_of_its_own(spec):
    channels = ChannelSet.parse(spec)
    names = [one.name for one in plan_sets(channels)]
    assert len(set(names)) == len(names) == 2 ** len(spec) - 1
    assert len({set_label(channels, s) for s in channels.subset_indices()}) == len(names)


# ---- how a model meets them


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
    results = evaluate_channel_sets(
        twin, loader, RGB, num_classes=4, modes=("named", "anonymous"), orders=ORDERS
    )
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


def test_a_stem_is_not_asked_what_is_equal_by_construction(twin):
    loader = batches(size=32)
    for told, mode in (("RGB", "named"), ("anonymous", "anonymous"), (None, "named")):
        timm_varchan.set_channels(twin, told)
        results = evaluate_channel_sets(twin, loader, RGB, num_classes=4)
        assert [(r.mode, r.order) for r in results] == [(mode, "in order")] * 7
        assert results.num_passes == 7
        assert results.order_check.equal
        assert results.order_check.num_images == 6
    timm_varchan.set_channels(twin, None)
    many = evaluate_channel_sets(
        twin, batches(4, 13, size=32), EUROSAT, num_classes=4, progress=False
    )
    assert len(many) == many.num_passes <= 40


@pytest.mark.parametrize("num_batches", [1, 3])
def test_the_bar_counts_sets_over_all_batches(twin, capfd, monkeypatch, num_batches):
    every_step = functools.partial(evaluate.tqdm, mininterval=0, miniters=1)
    monkeypatch.setattr(evaluate, "tqdm", every_step)
    loader = batches(num_images=2 * num_batches, size=32, batch_size=2)
    evaluate_channel_sets(twin, loader, RGB, num_classes=4, progress=True)
    shown = re.findall(r"evaluating 7 channel sets: (\d+)/(\d+)", capfd.readouterr().err)
    assert len(shown) >= 7
    assert {total for _, total in shown} == {"7"}
    counts = [int(count) for count, _ in shown]
    assert counts == sorted(counts)
    assert counts[-1] >= 6  # the last is wiped away
    evaluate_channel_sets(twin, iter(loader), RGB, num_classes=4, progress=True)
    assert "evaluating 7 channel sets" in capfd.readouterr().err


def test_an_order_that_does_change_the_answer_is_told(twin, monkeypatch):
    def feels_order(mixer, x):
        return x[:, :1] * torch.ones(1, mixer.num_virtual, 1, 1)

    monkeypatch.setattr(type(timm_varchan.models.stems(twin)[0]), "forward", feels_order)
    results = evaluate_channel_sets(twin, batches(size=32), RGB, num_classes=4)
    assert not results.order_check.equal


@pytest.mark.parametrize("mode", ["named", "anonymous"])
def test_stacked_sets_answer_as_sets_alone(twin, monkeypatch, mode):
    loader = batches(num_images=8, num_channels=4, size=32)
    alone = evaluate_channel_sets(twin, loader, FOUR, num_classes=4, modes=[mode])
    calls = []
    monkeypatch.setattr(evaluate, "_stack_size", lambda device: 64)
    handle = twin.register_forward_pre_hook(lambda _, x: calls.append(len(x[0])))
    stacked = evaluate_channel_sets(twin, loader, FOUR, num_classes=4, modes=[mode])
    handle.remove()
    assert max(calls) == 60  # ten sets of six images; all 15 sets of the last two are fewer
    for one, other in zip(alone, stacked, strict=True):
        assert one.predictions.tolist() == other.predictions.tolist()


def test_memory_that_runs_out_makes_stacks_smaller(twin, monkeypatch):
    loader = batches(num_images=6, num_channels=4, size=32)
    alone = evaluate_channel_sets(twin, loader, FOUR, num_classes=4)
    real = evaluate._Predictor._forward

    def small_memory(predictor, x, views, positions):
        if len(views) > 2:
            raise torch.OutOfMemoryError
        return real(predictor, x, views, positions)

    monkeypatch.setattr(evaluate, "_stack_size", lambda device: 1024)
    monkeypatch.setattr(evaluate._Predictor, "_forward", small_memory)
    found = evaluate_channel_sets(twin, loader, FOUR, num_classes=4)
    assert [r.predictions.tolist() for r in found] == [r.predictions.tolist() for r in alone]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_wrong_and_told(bad):
    model = timm.create_model("dwg_test_resnet", num_classes=2).eval()
    x = torch.randn(8, 3, 32, 32)
    x[:2, 0, :2, :2] = bad  # only where R is there
    loader = [(x, torch.zeros(8, dtype=torch.long))]
    results = evaluate_channel_sets(model, loader, RGB, num_classes=2)
    for result in results:
        expected = 2 if 0 in result.indices else 0
        assert result.num_not_finite == expected, result.channels
        assert not result.correct[:expected].any()
        assert result.to_json()["num_not_finite"] == expected
    plan = plan_sets(RGB)
    found = validate_channel_sets(model, loader, RGB, plan, "named")
    assert found.num_not_finite == {"RGB": 2, "RG": 2, "RB": 2, "R": 2}
    assert found.accuracy == results[0].metrics["accuracy"].value == found.sets["RGB"]
    assert math.isfinite(found.loss)
    x[:] = bad
    nothing = validate_channel_sets(model, loader, RGB, plan, "named")
    assert (nothing.accuracy, math.isnan(nothing.loss)) == (0.0, True)


def test_a_model_of_fixed_count_is_masked_and_feels_the_order():
    model = Weighted(5)
    assert not has_stems(model)
    loader = batches(num_images=60, num_channels=5)
    default = evaluate_channel_sets(model, loader, BANDS, num_classes=4)
    assert [r.size for r in default if r.order == "shuffled"] == [5]
    assert default.num_passes == len(default) == 32
    assert default.order_check is None
    results = evaluate_channel_sets(model, loader, BANDS, num_classes=4, orders=ORDERS)
    assert {result.mode for result in results} == {"mask"}
    whole, shuffled = results[:2]
    assert (whole.order, shuffled.order) == ("in order", "shuffled")
    assert whole.predictions.tolist() != shuffled.predictions.tolist()
    single = [r for r in results if r.size == 1]
    assert single[0].predictions.tolist() == single[1].predictions.tolist()


def test_statistics_are_found_by_positions_where_texts_are_equal(twin):
    channels = ChannelSet.anonymous(3)
    loader = batches(size=32)
    pairs = [(0, 1), (0, 2), (1, 2)]
    own = {
        (pair, "anonymous"): timm_varchan.estimate_bn_buffers(
            twin, [x[:, list(pair)] * (1 + pair[0] + pair[1]) for x, _ in loader], "anonymous"
        )
        for pair in pairs
    }
    views = [SetView(channels, pair, "anonymous", "in order") for pair in pairs]
    del own[(0, 2), "anonymous"]  # this set has the model's
    together, _ = predict_channel_sets(twin, loader, views, bn_buffers=own)
    for column, pair in enumerate(pairs):
        buffers = own.get((pair, "anonymous"))
        alone = timm_varchan.share(twin, "anonymous", bn_buffers=buffers).eval()
        with torch.no_grad():
            expected = torch.cat([alone(x[:, list(pair)]).argmax(1) for x, _ in loader])
        assert together[:, column].tolist() == expected.tolist()


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


# ---- what they say


def weighted_results(count, num_images=60, **kwargs):
    channels = ChannelSet.anonymous(count)
    loader = batches(num_images=num_images, num_channels=count)
    return evaluate_channel_sets(Weighted(count), loader, channels, num_classes=4, **kwargs)


def test_sizes_are_summarised_over_their_sets():
    results = evaluate_channel_sets(Weighted(3), batches(), RGB, num_classes=4, orders=["in order"])
    summaries = summarise_sizes(results)
    assert [(s.size, s.num_sets, s.num_possible) for s in summaries] == [
        (3, 1, 1), (2, 3, 3), (1, 3, 3)
    ]  # fmt: skip
    pairs = [r.metrics["accuracy"].value for r in results if r.size == 2]
    assert summaries[1].mean == pytest.approx(np.mean(pairs))
    assert summaries[1].std == pytest.approx(np.std(pairs))
    assert (summaries[1].worst, summaries[1].best) == (min(pairs), max(pairs))


def test_sets_that_somebody_chose_are_no_sample():
    loader = batches(num_images=40, num_channels=13)
    results = evaluate_channel_sets(Weighted(13), loader, EUROSAT, num_classes=4)
    rgb = next(r for r in results if r.name == "RGB")
    drawn = [r for r in results if r.size == 3 and r.kind == "sample"]
    summary = next(s for s in summarise_sizes(results) if s.size == 3)
    assert rgb.kind == "natural"
    assert summary.num_sets == len(drawn) >= 1
    assert summary.mean == pytest.approx(np.mean([r.correct.mean() for r in drawn]))


def test_channels_are_ranked_only_where_their_loss_is_certain():
    results = weighted_results(4, num_images=400, orders=["in order"])
    bands = rank_bands(results)
    whole, by_indices = results[0], {r.indices: r for r in results}
    assert sorted(band.index for band in bands) == [0, 1, 2, 3]
    for band in bands:
        rest = tuple(i for i in range(4) if i != band.index)
        expected = paired_difference(whole.correct, by_indices[rest].correct)
        assert band.loss_without == expected
        assert band.certain == (not expected.low <= 0 <= expected.high)
        assert band.name == f"#{band.index + 1}"
        assert band.alone == by_indices[(band.index,)].metrics["accuracy"]
    worth = [band.loss_without.difference if band.certain else 0 for band in bands]
    assert worth == sorted(worth, reverse=True)
    ties = [band.index for band in bands if not band.certain]
    assert ties == sorted(ties), "ties are not ranked"
    assert rank_bands(weighted_results(1)) == []


def test_few_images_tell_little():
    for count in (2, 22, 1000):
        least = smallest_difference(count)
        for changed, certain in ((least, True), (least - 1, False)):
            if 0 < changed <= count:
                better = np.arange(count) < changed
                assert (paired_difference(better, np.zeros(count)).low > 0) == certain
    assert smallest_difference(22) / 22 > 0.2
    assert smallest_difference(2) > 2


def test_saved_predictions_are_compared_image_by_image(tmp_path):
    names = list("abcd")
    loader = batches(num_images=60, num_channels=3)
    ours = evaluate_channel_sets(Weighted(3), loader, RGB, num_classes=4)
    flipped = [(x.flip(1), y) for x, y in loader]
    theirs = evaluate_channel_sets(Weighted(3), flipped, RGB, num_classes=4, sets="RG,B")
    mine = Predictions.of(ours, RGB, class_names=names, fingerprint=range(60))
    saved = Predictions.of(theirs, RGB, class_names=names, model="other", fingerprint=range(60))
    saved.save(tmp_path / "predictions.npz")
    for place in (tmp_path, tmp_path / "predictions.npz", tmp_path / "model"):
        found = Predictions.load(place)
        assert (found.model, found.sets) == ("other", saved.sets)
        np.testing.assert_array_equal(found.probabilities, saved.probabilities)
    compared = compare_predictions(mine, found)
    answered = {r.indices: r for r in theirs if r.order == "in order"}
    assert {ours[number].indices for number in compared} == set(answered)
    for number, one in compared.items():
        other = answered[ours[number].indices]
        assert ours[number].order == "in order"
        assert one.accuracy == other.metrics["accuracy"]
        assert one.difference == paired_difference(ours[number].correct, other.correct)
    few = evaluate_channel_sets(Weighted(3), loader[:-1], RGB, num_classes=4)
    for wrong in (
        Predictions.of(few, RGB, class_names=names),
        Predictions.of(ours, RGB, class_names=names, fingerprint=range(1, 61)),
        Predictions.of(ours, RGB, class_names=list("abce"), fingerprint=range(60)),
    ):
        with pytest.raises(ValueError, match="of other"):
            compare_predictions(mine, wrong)
    (tmp_path / "predictions.npz").write_bytes(b"PK broken")
    for place in (tmp_path, tmp_path / "none" / "none"):
        with pytest.raises(ValueError, match="no predictions"):
            Predictions.load(place)


def test_robustness_is_the_mean_over_sizes_of_means_over_sets():
    results = weighted_results(4, orders=["in order"])
    score = robustness(results)
    by_size = [[r.correct.mean() for r in results if r.size == n] for n in (1, 2, 3, 4)]
    assert score.uniform_mean == pytest.approx(np.mean([np.mean(group) for group in by_size]))
    losses = [band.loss_without for band in rank_bands(results)]
    assert score.worst_loss == max(losses, key=lambda loss: loss.difference)
    ends = robustness([r for r in results if r.size in (1, 4)])
    line = np.interp([1, 2, 3, 4], [1, 4], [np.mean(by_size[0]), np.mean(by_size[3])])
    assert ends.uniform_mean == pytest.approx(line.mean())
    assert ends.worst_loss is None
    assert robustness([r for r in results if r.size == 4]) is None


def test_unexplained_variance_foretells_the_loss_by_rank():
    results = weighted_results(4, orders=["in order"])
    losses = [-r.correct.mean() for r in results]
    assert foretold(results, losses) == pytest.approx(1.0)
    assert foretold(results, [-loss for loss in losses]) == pytest.approx(-1.0)
    assert foretold(results, [None] * len(results)) is None
    assert foretold(results, [0.5] * len(results)) is None
