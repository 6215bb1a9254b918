"""Units and property lists: what is in them, and that systemd itself has no complaint."""

from __future__ import annotations

import configparser
import os
import plistlib
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hcna_ray.supervisor.units import Host, launchd_plists, quoted, systemd_units


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(
        name="M1",
        program=Path(sys.executable),
        home=tmp_path,
        config=None,
        user="daemon",
        group="root",
        stop_s=8.0,
    )


def parsed(text: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(text)
    return parser


def test_m1_has_a_unit_for_itself_and_one_for_c1(host: Host) -> None:
    units = systemd_units(host)
    assert set(units) == {"hcna-m1.service", "hcna-c1.service"}
    service = parsed(units["hcna-m1.service"])["Service"]
    assert service["ExecStart"] == f"{sys.executable} supervise m1"
    assert service["Environment"] == f"HCNA_HOME={host.home}"
    assert service["User"] == "daemon"
    assert service["KillMode"] == "mixed"
    assert service["Restart"] == "on-failure"
    assert service["LimitNOFILE"] == "65536"
    assert parsed(units["hcna-m1.service"])["Unit"]["After"] == "network-online.target"


def test_a_worker_has_a_unit_with_its_name_and_none_for_c1(host: Host) -> None:
    units = systemd_units(replace(host, name="W2"))
    assert set(units) == {"hcna-w2.service"}
    assert " supervise w2\n" in units["hcna-w2.service"]


def test_c1_stops_and_starts_with_m1(host: Host) -> None:
    unit = parsed(systemd_units(host)["hcna-c1.service"])
    for name in ("After", "BindsTo", "PartOf"):
        assert unit["Unit"][name] == "hcna-m1.service"
    assert unit["Install"]["WantedBy"] == "hcna-m1.service"


def test_systemd_waits_longer_than_we_take_to_stop(host: Host) -> None:
    for stop_s in (1.0, 8.0, 60.0):
        service = parsed(systemd_units(replace(host, stop_s=stop_s))["hcna-m1.service"])["Service"]
        assert float(service["TimeoutStopSec"]) > 3 * stop_s + 30


def test_a_second_instance_and_a_wrong_name_are_not_tried_again(host: Host) -> None:
    service = parsed(systemd_units(host)["hcna-m1.service"])["Service"]
    assert service["RestartPreventExitStatus"] == "2 3"


def test_a_users_unit_names_no_user_and_wants_no_target_of_the_system(host: Host) -> None:
    text = systemd_units(host, of_user=True)["hcna-m1.service"]
    assert "User=" not in text
    assert "network-online" not in text
    assert "ProtectSystem" not in text
    assert parsed(text)["Install"]["WantedBy"] == "default.target"


def test_another_settings_file_is_named(host: Host) -> None:
    text = systemd_units(replace(host, config=Path("/srv/other.yaml")))["hcna-m1.service"]
    assert "Environment=HCNA_CONFIG=/srv/other.yaml HCNA_HOME=" in text


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("/opt/hcna", "/opt/hcna"),
        ("/opt/my home", '"/opt/my home"'),
        ("/opt/100%", "/opt/100%%"),
        ('/opt/"x"', '"/opt/\\"x\\""'),
        ("/opt/it's", '"/opt/it\'s"'),
    ],
)
def test_odd_paths_are_quoted(word: str, text: str) -> None:
    assert quoted(word) == text


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
@pytest.mark.parametrize("of_user", [False, True])
@pytest.mark.parametrize("odd", [False, True])
def test_systemd_itself_has_no_complaint(
    host: Host, tmp_path: Path, of_user: bool, odd: bool
) -> None:
    home = tmp_path / "it's 100% odd" if odd else tmp_path
    folder = tmp_path / "units"
    folder.mkdir()
    (tmp_path / "runtime").mkdir(mode=0o700)
    units = systemd_units(replace(host, home=home), of_user=of_user)
    for name, text in units.items():
        (folder / name).write_text(text)
    found = subprocess.run(
        [
            "systemd-analyze",
            "verify",
            *(["--user"] if of_user else []),
            *map(str, folder.iterdir()),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path / "runtime")},
        timeout=30,
        check=False,
    )
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


def test_the_property_lists_have_what_launchd_asks_for(host: Host) -> None:
    found = launchd_plists(host)
    assert set(found) == {"org.hcna-ray.m1.plist", "org.hcna-ray.c1.plist"}
    data = plistlib.loads(found["org.hcna-ray.m1.plist"])
    assert data["Label"] == "org.hcna-ray.m1"
    assert data["ProgramArguments"] == [sys.executable, "supervise", "m1"]
    assert data["EnvironmentVariables"] == {"HCNA_HOME": str(host.home)}
    assert data["WorkingDirectory"] == str(host.home)
    assert data["RunAtLoad"] is True
    assert data["KeepAlive"] == {"SuccessfulExit": False}
    assert data["ExitTimeOut"] > 24
    assert data["SoftResourceLimits"]["NumberOfFiles"] == 65536
    assert Path(data["StandardOutPath"]).parent == host.home / "logs"


def test_a_workers_property_list_has_its_name(host: Host) -> None:
    assert set(launchd_plists(replace(host, name="W2"))) == {"org.hcna-ray.w2.plist"}
