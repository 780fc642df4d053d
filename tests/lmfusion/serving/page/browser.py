"""Drives the page in headless Chromium through selenium."""

import json
import shutil
import time
import urllib.request

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = "Chromium or its driver is missing (Debian: apt-get install chromium chromium-driver)"

WATCH = """
window.seen = {texts: [], previews: []};
new MutationObserver(() => {
  const bots = document.querySelectorAll('#chat .bot');
  if (!bots.length) return;
  const bot = bots[bots.length - 1], text = bot.innerText, preview = bot.querySelector('img.preview');
  const last = (list) => list[list.length - 1];
  if (text !== last(seen.texts)) seen.texts.push(text);
  if (preview && preview.src !== last(seen.previews)) seen.previews.push(preview.src);
}).observe(document.querySelector('#chat'), {subtree: true, childList: true, characterData: true, attributes: true});
"""


class Browser:
    """A browser window with the page."""

    def __init__(self, *arguments):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        quiet = ("--disable-background-networking", "--disable-component-update", "--no-first-run")
        # Containers have no user namespaces for the sandbox, and little shared memory
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", *quiet, *arguments):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        self.url = ""

    def open(self, url):
        self.url = url
        self.driver.get(url)
        self.wait(lambda: self.all("#box textarea") and self.all("#max-tokens input"))
        self.driver.execute_script(WATCH)

    def wait(self, condition, seconds=30):
        """Wait until `condition` returns something true, and return it."""
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + seconds
        while True:
            try:
                if found := condition():
                    return found
            except StaleElementReferenceException:
                pass  # the page has changed in between
            assert time.monotonic() < end, f"it did not happen in time; the page says: {self.text('body')!r}"
            time.sleep(0.02)

    def all(self, selector):
        from selenium.webdriver.common.by import By

        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.wait(lambda: self.all(selector))[0]

    def text(self, selector):
        """The text of the last element that the selector finds; "" if there is none."""
        found = "return [...document.querySelectorAll(arguments[0])].pop()?.innerText ?? ''"
        return self.driver.execute_script(found, selector)

    def click(self, selector):
        self.driver.execute_script("arguments[0].click()", self.one(selector))

    def set(self, name, value):
        """Set a number or a checkbox of the settings."""
        from selenium.webdriver.common.keys import Keys

        field = self.one(f"#{name} input[type=number], #{name} input[type=checkbox]")
        if isinstance(value, bool):
            if field.is_selected() != value:
                self.driver.execute_script("arguments[0].click()", field)
        else:
            field.send_keys(Keys.CONTROL, "a")
            field.send_keys(str(value), Keys.TAB)

    def setting(self, name):
        return self.one(f"#{name} input").get_attribute("value")

    def upload(self, *paths):
        self.one("#box input[type=file]").send_keys("\n".join(map(str, paths)))
        self.wait(lambda: len(self.all("#box .thumbnail-item, #box .thumbnail-image")) >= len(paths))

    def send(self, text):
        """Send a message. Returns once the answer has started."""
        from selenium.webdriver.common.keys import Keys

        num_answers = len(self.all("#chat .bot"))
        self.one("#box textarea").send_keys(text, Keys.ENTER)
        self.wait(lambda: len(self.all("#chat .bot")) > num_answers)

    @property
    def is_answering(self):
        return bool(self.all("#box .stop-button"))

    def wait_for_answer(self):
        self.wait(lambda: not self.is_answering)

    def ask(self, text):
        self.send(text)
        self.wait_for_answer()

    def seen(self):
        """The texts and previews that were shown since the page was opened or `seen` was called."""
        return self.driver.execute_script("const found = seen; window.seen = {texts: [], previews: []}; return found")

    def image(self):
        """The file of the newest finished image of the chat, as bytes."""
        address = self.wait(lambda: self.all("#chat .bot img.image"))[-1].get_attribute("src")
        with urllib.request.urlopen(address) as response:
            return response.read()

    def complaints(self):
        """Console messages, and requests to anything except the page's server, since the last call."""
        lines = [entry["message"] for entry in self.driver.get_log("browser")]
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                address = message["params"]["request"]["url"]
                if not address.startswith((self.url, "data:", "blob:")):
                    lines.append(f"request to {address}")
        return lines

    def close(self):
        self.driver.quit()
