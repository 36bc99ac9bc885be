"""Named slices: sizes, devices, and errors that help."""

from __future__ import annotations

import importlib.util

import pytest

from jaxheads.parallel.topology import CHIPS, parse_topology
from jaxheads.training.metrics import peak_flops

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@pytest.mark.parametrize(
    ("name", "chips", "devices"),
    [
        ("v5p:8x8x8", 512, 512),
        ("v6e:16x16", 256, 256),
        ("tpu7x:2x2x1", 4, 8),
        ("V5E:4x4", 16, 16),
        ("h200:8", 8, 8),
        ("cpu:8", 8, 8),
    ],
)
def test_slices_count_chips_and_devices(name, chips, devices):
    topology = parse_topology(name)
    assert (topology.num_chips, topology.num_devices) == (chips, devices)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5q:8x8x8", "did you mean 'v5p'"),
        ("v5p", "for example v5p:2x2x1"),
        ("v5p:", "for example"),
        ("v5p:8x8", "3 positive sizes, got 2"),
        ("v5e:4x0", "positive"),
        ("v5e:32x32", "largest v5e slice has 256"),
        ("h200:2x4", "1 positive"),
        ("v5p:8xeight", "for example"),
        ("", "unknown chip"),
    ],
)
def test_bad_names_are_errors_with_good_names(name, message):
    with pytest.raises(ValueError, match=message):
        parse_topology(name)


def test_cpu_devices_are_the_simulated_ones():
    assert len(parse_topology("cpu:4").devices()) == 4
    with pytest.raises(ValueError, match="simulated_devices=16"):
        parse_topology("cpu:16").devices()


def test_gpus_cannot_be_compiled_for():
    with pytest.raises(NotImplementedError, match="analytically"):
        parse_topology("h100:8").devices()


@needs_libtpu
@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    "chip", [c for c in CHIPS.values() if c.platform == "tpu"], ids=lambda c: c.name
)
def test_every_example_is_a_topology_of_the_compiler(chip):
    for name in chip.examples:
        topology = parse_topology(name)
        devices = topology.devices()
        assert len(devices) == topology.num_devices
        assert peak_flops(devices[0]) == chip.peak_flops


@needs_libtpu
@pytest.mark.tpu_aot
def test_a_slice_without_whole_hosts_is_refused_with_examples():
    with pytest.raises(ValueError, match="v5p:8x8x8"):
        parse_topology("v5p:7x7x7").devices()


@pytest.mark.parametrize(
    ("name", "wraps"),
    [
        ("v5p:4x4x4", (True, True, True)),
        ("tpu7x:2x4x4", (False, False, False)),
        ("v5e:4x4", (False, False, False)),
        ("v5e:8x16", (False, True, False)),
        ("v6e:16x16", (True, True, False)),
        ("h200:8", None),
    ],
)
def test_links_close_where_the_machine_closes_them(name, wraps):
    assert parse_topology(name).wraps == wraps
