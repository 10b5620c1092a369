//! The windows' pages, driven by WebDriver attached to the running app.
//!
//! `WebKitWebDriver --target` joins the web inspector that the app opens when `TAURI_WEBVIEW_AUTOMATION` and
//! `WEBKIT_INSPECTOR_SERVER` are set; the app need not be started by the driver, nor have a window yet.

use super::{Lab, Process, Scheme, until};
use anyhow::{Context, Result, bail, ensure};
use fantoccini::actions::{InputSource, KeyAction, KeyActions};
use fantoccini::key::Key;
use fantoccini::{Client, ClientBuilder, Locator, elements::Element};
use hyper_util::client::legacy::connect::HttpConnector;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A page appears and answers within this.
const PATIENCE: Duration = Duration::from_secs(30);
/// A page with more stops for Tab than this leads nowhere.
const MOST_STOPS: usize = 30;

/// What has the focus: the `data-action` of a button, the `name` of a field, or else the tag, such as `h1`.
const FOCUS: &str =
    "const e = document.activeElement; return e.dataset.action || e.name || e.localName;";
/// How a person sees what has the focus.
const STOP: &str = "
    const e = document.activeElement, style = getComputedStyle(e), box = e.getBoundingClientRect();
    const top = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
    return {
        name: e.dataset.action || e.name || e.localName,
        marked: e.matches(':focus-visible') && (style.outlineStyle !== 'none' || style.boxShadow !== 'none'),
        uncovered: top !== null && e.contains(top),
    };";
/// What axe-core finds, one line each.
const AXE: &str = "
    const done = arguments[0];
    axe.run({ rules: { 'target-size': { enabled: true } } }).then(
        ({ violations }) => done(violations.flatMap((rule) =>
            rule.nodes.map((node) => `${rule.id}: ${node.html}: ${node.failureSummary}`))),
        (error) => done([`axe: ${error}`]));";

/// What is wider than its place, and so cut off or to be scrolled to sideways.
const TOO_WIDE: &str = "
    return [...document.querySelectorAll('body *')].filter((e) => e.scrollWidth > e.clientWidth + 1
        && getComputedStyle(e).display !== 'inline' && !e.closest('svg, .hidden')).map((e) => e.outerHTML);";

/// A place where Tab stops.
#[derive(Debug, Deserialize)]
struct Stop {
    name: String,
    marked: bool,
    uncovered: bool,
}

/// A window's page.
#[derive(Debug)]
pub struct Web {
    client: Client,
    _driver: Process,
}

impl Web {
    /// Attaches to the app whose inspector listens on `inspector`, as soon as it has a window; the driver gets the port `driver`.
    ///
    /// # Errors
    /// When no window appears.
    pub async fn attach(lab: &Lab, inspector: u16, driver: u16) -> Result<Self> {
        let mut command = lab.command("WebKitWebDriver");
        command.args([
            format!("--port={driver}"),
            format!("--target=127.0.0.1:{inspector}"),
        ]);
        let mut process = lab.start("webdriver", command)?;
        let url = format!("http://127.0.0.1:{driver}");
        let client = until("WebDriver attaches to a window", PATIENCE, async || {
            process.must_run()?;
            let builder = ClientBuilder::new(HttpConnector::new());
            Ok(builder.connect(&url).await.ok())
        })
        .await?;
        let web = Self {
            client,
            _driver: process,
        };
        web.enter_window().await?;
        Ok(web)
    }

    /// Goes to the window that is open: a session that begins while another one closes still names the old.
    ///
    /// # Errors
    /// When none is open.
    pub async fn enter_window(&self) -> Result<()> {
        until("a window answers WebDriver", PATIENCE, async || {
            for window in self.client.windows().await? {
                if self.client.switch_to_window(window).await.is_ok()
                    && self.client.find(Locator::Css("body")).await.is_ok()
                {
                    return Ok(Some(()));
                }
            }
            Ok(None)
        })
        .await
    }

    /// The WebDriver session, for everything that has no shorthand here.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The words on the page.
    ///
    /// # Errors
    /// When the page is gone.
    pub async fn text(&self) -> Result<String> {
        Ok(self.client.find(Locator::Css("body")).await?.text().await?)
    }

    /// Waits until these words are on the page.
    ///
    /// # Errors
    /// After `bound`, with the words that were there.
    pub async fn shows(&self, words: &str, bound: Duration) -> Result<()> {
        let mut last = String::new();
        let what = format!("the window shows {words:?}");
        until(&what, bound, async || {
            // A page that is being replaced has no body for a moment.
            last = self.text().await.unwrap_or_default();
            Ok(last.contains(words).then_some(()))
        })
        .await
        .with_context(|| format!("the window shows: {last}"))
    }

    /// The first element of this CSS selector, as soon as it is there.
    ///
    /// # Errors
    /// When it does not appear.
    pub async fn element(&self, css: &str) -> Result<Element> {
        until(&format!("{css} is on the page"), PATIENCE, async || {
            Ok(self.client.find(Locator::Css(css)).await.ok())
        })
        .await
    }

    /// Waits until the window is on this screen: the `screen` of `mayfly_session_manager::view::Screen`, or `settings`.
    ///
    /// # Errors
    /// After `bound`, with the words that were there.
    pub async fn screen(&self, name: &str, bound: Duration) -> Result<()> {
        let css = format!("main[data-screen={name}]");
        until(&format!("the window shows {name}"), bound, async || {
            Ok(self.client.find(Locator::Css(&css)).await.ok().map(drop))
        })
        .await
        .with_context(|| format!("looking for {css}"))
    }

    /// Clicks the button of an action (`new_desktop`, `cancel`, …), as soon as it is there and enabled.
    ///
    /// # Errors
    /// When it does not appear.
    pub async fn act(&self, action: &str) -> Result<()> {
        let css = format!("main button[data-action={action}]");
        until(
            &format!("there is a button {action}"),
            PATIENCE,
            async || {
                let Ok(button) = self.client.find(Locator::Css(&css)).await else {
                    return Ok(None);
                };
                if !button.is_enabled().await.unwrap_or(false) {
                    return Ok(None);
                }
                Ok(button.click().await.ok())
            },
        )
        .await
    }

    /// Saves a screenshot of the page as it is now: two frames are awaited, because the driver's picture lags.
    ///
    /// # Errors
    /// When the page is gone or the file cannot be written.
    pub async fn screenshot(&self, path: &Path) -> Result<()> {
        let frames = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done(true)))";
        self.client.execute_async(frames, Vec::new()).await?;
        let png = self.client.screenshot().await?;
        ensure!(png.starts_with(b"\x89PNG"), "the driver gave no PNG");
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::write(path, png).with_context(|| format!("writing {}", path.display()))
    }

    /// Presses a key, in whatever has the focus.
    ///
    /// # Errors
    /// When the page is gone.
    pub async fn press(&self, key: Key) -> Result<()> {
        let value = key.into();
        let keys = KeyActions::new("keyboard".to_owned())
            .then(KeyAction::Down { value })
            .then(KeyAction::Up { value });
        Ok(self.client.perform_actions(keys).await?)
    }

    /// Presses Shift and Tab, which lead to the stop before.
    ///
    /// # Errors
    /// When the page is gone.
    pub async fn press_back_tab(&self) -> Result<()> {
        let (shift, tab) = (Key::Shift.into(), Key::Tab.into());
        let keys = KeyActions::new("keyboard".to_owned())
            .then(KeyAction::Down { value: shift })
            .then(KeyAction::Down { value: tab })
            .then(KeyAction::Up { value: tab })
            .then(KeyAction::Up { value: shift });
        Ok(self.client.perform_actions(keys).await?)
    }

    /// Types into whatever has the focus.
    ///
    /// # Errors
    /// When the page is gone.
    pub async fn type_text(&self, text: &str) -> Result<()> {
        let mut keys = KeyActions::new("keyboard".to_owned());
        for value in text.chars() {
            keys = keys
                .then(KeyAction::Down { value })
                .then(KeyAction::Up { value });
        }
        Ok(self.client.perform_actions(keys).await?)
    }

    /// Waits until this has the focus: a button's action, a field's name, or a tag such as `h1`. Lost, it is at `body`.
    ///
    /// # Errors
    /// After a bound, with what has it.
    pub async fn focus_is(&self, name: &str) -> Result<()> {
        let mut last = String::new();
        let found = until(&format!("{name} has the focus"), PATIENCE, async || {
            let focus = self.client.execute(FOCUS, Vec::new()).await?;
            focus.as_str().unwrap_or_default().clone_into(&mut last);
            Ok((last == name).then_some(()))
        })
        .await;
        found.with_context(|| format!("it is at {last}"))
    }

    /// Presses Tab until this has the focus.
    ///
    /// # Errors
    /// When Tab does not lead there.
    pub async fn tab_to(&self, name: &str) -> Result<()> {
        for _ in 0..MOST_STOPS {
            self.press(Key::Tab).await?;
            if self.stop().await?.name == name {
                return Ok(());
            }
        }
        bail!("Tab does not lead to {name}")
    }

    /// The stops of Tab, once around, from the one after what has the focus now.
    ///
    /// # Errors
    /// When a person would not see where they are: no mark around a stop, or something over it.
    pub async fn stops(&self) -> Result<Vec<String>> {
        let mut stops: Vec<String> = Vec::new();
        while stops.len() < MOST_STOPS {
            self.press(Key::Tab).await?;
            let stop = self.stop().await?;
            if stops.first() == Some(&stop.name) {
                return Ok(stops);
            }
            ensure!(stop.marked && stop.uncovered, "{stop:?} after {stops:?}");
            stops.push(stop.name);
        }
        bail!("Tab does not come back: {stops:?}")
    }

    async fn stop(&self) -> Result<Stop> {
        let stop = self.client.execute(STOP, Vec::new()).await?;
        Ok(serde_json::from_value(stop)?)
    }

    /// Waits until the page is drawn as the desk prefers it.
    ///
    /// # Errors
    /// When it does not follow.
    pub async fn follows(&self, scheme: Scheme) -> Result<()> {
        let name = scheme.name();
        let query = format!("return matchMedia('(prefers-color-scheme: {name})').matches");
        until(&format!("the page is {name}"), PATIENCE, async || {
            let matches = self.client.execute(&query, Vec::new()).await?;
            Ok((matches == true).then_some(()))
        })
        .await
    }

    /// Parts of the page that are wider than their place; none is what a test wants.
    ///
    /// # Errors
    /// When the page is gone.
    pub async fn too_wide(&self) -> Result<Vec<String>> {
        let found = self.client.execute(TOO_WIDE, Vec::new()).await?;
        Ok(serde_json::from_value(found)?)
    }

    /// What axe-core finds on the page as it is drawn now, one line each; none is what a test wants.
    ///
    /// # Errors
    /// When the windows' packages are not installed, or the page is gone.
    pub async fn complaints(&self) -> Result<Vec<String>> {
        let here = "return typeof axe === 'object'";
        if self.client.execute(here, Vec::new()).await? != true {
            self.client.execute(&axe()?, Vec::new()).await?;
        }
        let found = self.client.execute_async(AXE, Vec::new()).await?;
        Ok(serde_json::from_value(found)?)
    }
}

/// The source of axe-core.
fn axe() -> Result<String> {
    let path: PathBuf = [
        env!("CARGO_MANIFEST_DIR"),
        "../ui/node_modules/axe-core/axe.min.js",
    ]
    .iter()
    .collect();
    std::fs::read_to_string(&path).with_context(|| {
        format!(
            "reading {}: run the tests by `cargo xtask test`, or `npm ci` in ui/",
            path.display()
        )
    })
}
