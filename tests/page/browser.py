"""Chromium without a window, as a person uses it: by what is written on things."""

from __future__ import annotations

import base64
import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from axe_core_python.selenium import Axe
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import load_pem_x509_certificate
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

#: Screenshots stay here after a run.
PICTURES = Path(__file__).parents[2] / "build" / "page"
PATIENCE_S = 30.0
TABS_MAX = 60
WIDE, PHONE = (1280, 900), (390, 844)
MISSING = "chromium and chromedriver are not here; scripts/system_packages.sh brings them"

#: What is meant for ears alone is not on the screen, and what scrolls may be wider than its box.
_CUT_OFF = """
const wide = document.documentElement.clientWidth;
const cut = (one) => {
  if (one.closest(".unseen, .skip, thead, pre, textarea")) return false;
  const { left, right, width } = one.getBoundingClientRect();
  return width > 0 && (left < -1 || right > wide + 1 || one.scrollWidth > one.clientWidth + 1
    && !["inline", "contents"].includes(getComputedStyle(one).display) && one.clientWidth > 0);
};
return [...document.querySelectorAll("body *")].filter(cut).map(
  (one) => one.outerHTML.slice(0, 120));
"""


def found() -> bool:
    """Whether there is a browser to be driven."""
    return bool(shutil.which("chromium") and shutil.which("chromedriver"))


class Browser:
    """One tab, and where C1 is."""

    def __init__(self, driver: Chrome, url: str = "") -> None:
        self.driver, self.url = driver, url
        self.as_it_was()

    def open(self, where: str = "") -> None:
        """Open a view of the page, as somebody who types its address."""
        self.driver.get(f"{self.url}/ui{where}")

    def leave(self) -> None:
        """Leave the page, and forget what was said of it."""
        self.driver.get("about:blank")
        self.as_it_was()
        self.complaints()

    def as_it_was(self) -> None:
        """Be a wide and light screen with a network."""
        self.size(WIDE)
        self.scheme("light")
        self.offline(False)
        self.cut()

    def sign_in(self, key: str) -> None:
        """Open the page and sign in with the keyboard."""
        self.open()
        field = self.find("#key")
        field.send_keys(key, Keys.ENTER)
        self.see("Machines", "h2")

    def find(self, selector: str) -> WebElement:
        """Return an element that is there, or comes."""
        return self._until(lambda: next(iter(self.all(selector)), None), f"no {selector}")

    def all(self, selector: str) -> list[WebElement]:
        """Return what fits a CSS selector now."""
        elements: list[WebElement] = self.driver.find_elements(By.CSS_SELECTOR, selector)
        return elements

    def text(self, selector: str = "body") -> str:
        """Return what is written in it, or nothing."""
        return "\n".join(element.text for element in self.all(selector))

    def see(self, text: str, selector: str = "body") -> None:
        """Wait until something is written somewhere."""
        self._until(lambda: text in self.text(selector), f"no {text!r} in {selector}")

    def see_no(self, text: str, selector: str = "body") -> None:
        """Wait until something is no longer written somewhere."""
        self._until(lambda: text not in self.text(selector), f"still {text!r} in {selector}")

    def press(self, name: str, selector: str = "button") -> None:
        """Press the button, or follow the link, that is named so."""

        def named() -> WebElement | None:
            for element in self.all(selector):
                if element.accessible_name == name and element.is_displayed():
                    return element
            return None

        self._until(named, f"no {selector} named {name!r}").click()

    def type(self, text: str, selector: str) -> None:
        """Write into a field, in place of what stands in it."""
        self.find(selector).send_keys(Keys.CONTROL, "a", Keys.NULL, text)

    def buttons(self) -> list[str]:
        """Return the names of all buttons."""
        return [element.accessible_name for element in self.all("button") if element.is_displayed()]

    def keys(self, *keys: str) -> None:
        """Type on whatever has the focus."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def focused(self) -> str:
        """Return the name of what has the focus."""
        return str(self.driver.switch_to.active_element.accessible_name)

    def tab_to(self, name: str) -> None:
        """Press Tab until what is named so has the focus."""
        passed: list[str] = []
        while len(passed) < TABS_MAX:
            self.keys(Keys.TAB)
            passed.append(self.focused())
            if passed[-1] == name:
                return
        raise AssertionError(f"no way to {name!r}: {passed}")

    def _until(self, look: Any, words: str) -> Any:
        def seen(_: object) -> Any:
            try:
                return look()
            except StaleElementReferenceException:
                return None  # It was drawn anew meanwhile.

        return WebDriverWait(self.driver, PATIENCE_S, 0.1).until(seen, words)

    # -- how it is looked at ---------------------------------------------------------------------

    def tell(self, command: str, **said: Any) -> None:
        """Say something in Chromium's own protocol."""
        self.driver.execute_cdp_cmd(command, said)

    def size(self, size: tuple[int, int]) -> None:
        """Be a screen of this size."""
        width, height = size
        self.tell(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=size == PHONE,
        )

    def scheme(self, scheme: str) -> None:
        """Prefer light or dark."""
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.tell("Emulation.setEmulatedMedia", features=features)

    def offline(self, offline: bool) -> None:
        """Pull the plug of the network, or put it back."""
        self.tell("Network.enable")
        self.tell(
            "Network.emulateNetworkConditions",
            offline=offline,
            latency=0,
            downloadThroughput=-1,
            uploadThroughput=-1,
        )

    def cut(self, *urls: str) -> None:
        """Let nothing through to these addresses (``*`` is any text), and to all others again."""
        self.tell("Network.enable")
        self.tell("Network.setBlockedURLs", urls=list(urls))

    def kept(self) -> dict[str, str]:
        """Return what this tab keeps."""
        found: dict[str, str] = self.driver.execute_script("return {...sessionStorage}")
        return found

    def picture(self, name: str, *, whole: bool = False) -> None:
        """Keep a screenshot: of what the screen shows, or of the whole page."""
        PICTURES.mkdir(parents=True, exist_ok=True)
        more: dict[str, Any] = {}
        if whole:
            size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
            more = {"captureBeyondViewport": True, "clip": {**size, "scale": 1}}
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", **more})
        (PICTURES / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))

    # -- what is wrong with it -------------------------------------------------------------------

    def complaints(self) -> list[str]:
        """Return the warnings and errors of the console since the last look."""
        entries = self.driver.get_log("browser")
        return [one["message"] for one in entries if one["level"] in ("WARNING", "SEVERE")]

    def barriers(self) -> list[str]:
        """Return what axe-core finds serious or critical."""
        told: Mapping[str, Any] = Axe().run(self.driver)
        return [
            f"{one['id']}: {one['help']}: {[node['html'][:200] for node in one['nodes']][:3]}"
            for one in told["violations"]
            if one["impact"] in ("serious", "critical")
        ]

    def cut_off(self) -> list[str]:
        """Return what is not all on the screen from left to right, or not all in its own box."""
        found: list[str] = self.driver.execute_script(_CUT_OFF)
        return found


def pin_of(certificate: str) -> str:
    """Return what names a certificate's key to Chromium."""
    key = load_pem_x509_certificate(certificate.encode()).public_key()
    told = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(hashlib.sha256(told).digest()).decode()


@contextmanager
def a_browser(profile: Path, *, trusted: str | None = None) -> Iterator[Browser]:
    """Start a Chromium with a profile of its own.

    Args:
        profile: A folder that is not there yet.
        trusted: A certificate (PEM) that it takes although no authority that it knows issued it.
    """
    options = ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in (
        "--headless=new",
        "--no-sandbox",  # Tests may run as root, where it does not start otherwise.
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--no-first-run",
        "--hide-scrollbars",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    if trusted is not None:
        options.add_argument(f"--ignore-certificate-errors-spki-list={pin_of(trusted)}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
