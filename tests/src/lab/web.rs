//! The windows' pages, driven by WebDriver attached to the running app.
//!
//! `WebKitWebDriver --target` joins the web inspector that the app opens when `TAURI_WEBVIEW_AUTOMATION` and
//! `WEBKIT_INSPECTOR_SERVER` are set; the app need not be started by the driver, nor have a window yet.

use super::{Lab, Process, until};
use anyhow::{Context, Result, ensure};
use fantoccini::{Client, ClientBuilder, Locator, elements::Element};
use hyper_util::client::legacy::connect::HttpConnector;
use std::path::Path;
use std::time::Duration;

/// A page appears and answers within this.
const PATIENCE: Duration = Duration::from_secs(30);

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
}
