//! The screen: a virtual X display that is looked at and typed into.

use super::{Lab, Process, until};
use anyhow::{Context, Result, bail, ensure};
use image::RgbImage;
use std::collections::HashSet;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use x11rb::connection::Connection;
use x11rb::protocol::xproto::{
    ClientMessageEvent, ConnectionExt, EventMask, ImageFormat, MapState,
};
use x11rb::rust_connection::RustConnection;

/// An Xvfb of the lab's own.
#[derive(Debug)]
pub struct Screen {
    process: Process,
    display: String,
}

/// What is on the screen at one moment.
#[derive(Clone, PartialEq, Eq)]
pub struct Picture(RgbImage);

impl Screen {
    /// Width and height in pixels.
    pub const SIZE: (u16, u16) = (1366, 900);

    pub(super) async fn start(lab: &Lab) -> Result<Self> {
        let mut command = lab.command("Xvfb");
        let (width, height) = Self::SIZE;
        command
            .args(["-displayfd", "1", "-nolisten", "tcp", "-noreset"])
            .args(["-screen", "0", &format!("{width}x{height}x24")]);
        let mut process = lab.start("xvfb", command)?;
        let display = until(
            "Xvfb names its display",
            Duration::from_secs(30),
            async || {
                process.must_run()?;
                let output = process.output();
                Ok(output
                    .lines()
                    .find(|line| line.parse::<u32>().is_ok())
                    .map(|number| format!(":{number}")))
            },
        )
        .await?;
        Ok(Self { process, display })
    }

    /// `DISPLAY` of what shall appear here.
    #[must_use]
    pub fn display(&self) -> &str {
        &self.display
    }

    /// Process id of the X server.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn connect(&self) -> Result<(RustConnection, u32)> {
        let (connection, screen) = RustConnection::connect(Some(&self.display))
            .with_context(|| format!("connecting to display {}", self.display))?;
        let root = connection.setup().roots[screen].root;
        Ok((connection, root))
    }

    /// What is on the screen now.
    ///
    /// # Errors
    /// When the X server does not answer.
    pub fn picture(&self) -> Result<Picture> {
        let (connection, root) = self.connect()?;
        let (width, height) = Self::SIZE;
        let reply = connection
            .get_image(ImageFormat::Z_PIXMAP, root, 0, 0, width, height, u32::MAX)?
            .reply()?;
        // 24 bits deep means four bytes a pixel: blue, green, red, nothing.
        let bytes = reply
            .data
            .chunks_exact(4)
            .flat_map(|pixel| [pixel[2], pixel[1], pixel[0]])
            .collect();
        RgbImage::from_raw(u32::from(width), u32::from(height), bytes)
            .map(Picture)
            .context("the screen has another size than was asked for")
    }

    /// Waits until the screen shows something worth looking at that does not change for `still`; at least `colours` different
    /// ones tell a desktop from a blank screen, a login dialogue or a lone window.
    ///
    /// A blinking cursor or a clock may change: up to a thousandth of the pixels.
    ///
    /// # Errors
    /// After `bound`.
    pub async fn still_picture(
        &self,
        colours: usize,
        still: Duration,
        bound: Duration,
    ) -> Result<Picture> {
        let what = format!("the screen shows {colours} colours or more and is still");
        self.settled(&what, |picture| picture.colours() >= colours, still, bound)
            .await
    }

    /// The screen once a twentieth of it or more differs from `before` (a window, not a notification) and it has been
    /// still for `still`.
    ///
    /// # Errors
    /// After `bound`.
    pub async fn changed_picture(
        &self,
        before: &Picture,
        still: Duration,
        bound: Duration,
    ) -> Result<Picture> {
        let what = "the screen has changed and is still";
        self.settled(
            what,
            |picture| picture.difference(before) > 0.05,
            still,
            bound,
        )
        .await
    }

    async fn settled(
        &self,
        what: &str,
        good: impl Fn(&Picture) -> bool,
        still: Duration,
        bound: Duration,
    ) -> Result<Picture> {
        let mut last = self.picture()?;
        let mut since = Instant::now();
        until(what, bound, async || {
            tokio::time::sleep(Duration::from_millis(250)).await;
            let now = self.picture()?;
            if !good(&now) || now.difference(&last) > 0.001 {
                since = Instant::now();
            }
            last = now;
            Ok((since.elapsed() >= still).then(|| last.clone()))
        })
        .await
    }

    /// Titles of the visible windows, the uppermost last.
    ///
    /// # Errors
    /// When the X server does not answer.
    pub fn windows(&self) -> Result<Vec<String>> {
        Ok(self
            .find_windows()?
            .into_iter()
            .map(|(_, title)| title)
            .collect())
    }

    fn find_windows(&self) -> Result<Vec<(u32, String)>> {
        let (connection, root) = self.connect()?;
        let name = connection
            .intern_atom(false, b"_NET_WM_NAME")?
            .reply()?
            .atom;
        let utf8 = connection.intern_atom(false, b"UTF8_STRING")?.reply()?.atom;
        let mut found = Vec::new();
        for window in connection.query_tree(root)?.reply()?.children {
            // A window may vanish between two questions.
            let Ok(attributes) = connection.get_window_attributes(window)?.reply() else {
                continue;
            };
            if attributes.map_state != MapState::VIEWABLE {
                continue;
            }
            let title = |property: u32, kind: u32| -> Option<String> {
                let value = connection
                    .get_property(false, window, property, kind, 0, 256)
                    .ok()?
                    .reply()
                    .ok()?
                    .value;
                (!value.is_empty()).then(|| String::from_utf8_lossy(&value).into_owned())
            };
            // xfreerdp sets only the older of the two.
            if let Some(title) = title(name, utf8).or_else(|| title(39, 31)) {
                found.push((window, title));
            }
        }
        Ok(found)
    }

    /// Waits for a visible window whose title contains `title`.
    ///
    /// # Errors
    /// After `bound`.
    pub async fn window(&self, title: &str, bound: Duration) -> Result<u32> {
        until(&format!("a window {title:?} is there"), bound, async || {
            Ok(self
                .find_windows()?
                .into_iter()
                .find(|(_, name)| name.contains(title))
                .map(|(window, _)| window))
        })
        .await
    }

    /// Closes a window as its close button does: asks its program (`WM_DELETE_WINDOW`, ICCCM 4.2.8.1).
    ///
    /// # Errors
    /// When the X server does not answer.
    pub fn close(&self, window: u32) -> Result<()> {
        let (connection, _) = self.connect()?;
        let protocols = connection
            .intern_atom(false, b"WM_PROTOCOLS")?
            .reply()?
            .atom;
        let delete = connection
            .intern_atom(false, b"WM_DELETE_WINDOW")?
            .reply()?
            .atom;
        let event = ClientMessageEvent::new(32, window, protocols, [delete, 0, 0, 0, 0]);
        connection
            .send_event(false, window, EventMask::NO_EVENT, event)?
            .check()
            .context("asking a window to close")?;
        Ok(())
    }

    /// Gives a window the keyboard.
    ///
    /// # Errors
    /// When the window is not there.
    pub fn focus(&self, window: u32) -> Result<()> {
        self.xdotool(&["windowraise", &window.to_string()])?;
        self.xdotool(&["windowfocus", "--sync", &window.to_string()])
    }

    /// Presses a key or a combination in the window that has the keyboard, such as `ctrl+alt+t` or `Return` (X keysym names).
    ///
    /// # Errors
    /// When xdotool is missing or does not know the key.
    pub fn press(&self, key: &str) -> Result<()> {
        self.xdotool(&["key", "--delay", "60", key])
    }

    /// Types text into the window that has the keyboard.
    ///
    /// # Errors
    /// When xdotool is missing.
    pub fn type_text(&self, text: &str) -> Result<()> {
        // Not as an argument: it may be a password.
        let mut xdotool = Command::new("xdotool")
            .args(["type", "--delay", "60", "--file", "-"])
            .env("DISPLAY", &self.display)
            .stdin(Stdio::piped())
            .spawn()
            .context("starting xdotool (package xdotool)")?;
        if let Some(mut input) = xdotool.stdin.take() {
            input.write_all(text.as_bytes())?;
        }
        let status = xdotool.wait()?;
        ensure!(status.success(), "xdotool type: {status}");
        Ok(())
    }

    /// Clicks at a place of the screen.
    ///
    /// # Errors
    /// When xdotool is missing.
    pub fn click(&self, x: u32, y: u32) -> Result<()> {
        self.xdotool(&["mousemove", &x.to_string(), &y.to_string(), "click", "1"])
    }

    fn xdotool(&self, args: &[&str]) -> Result<()> {
        let output = Command::new("xdotool")
            .args(args)
            .env("DISPLAY", &self.display)
            .output()
            .context("starting xdotool (package xdotool)")?;
        if !output.status.success() {
            bail!(
                "xdotool {}: {}",
                args.join(" "),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(())
    }
}

impl Picture {
    /// How many different colours it has, at 5 bits a channel.
    #[must_use]
    pub fn colours(&self) -> usize {
        self.0
            .pixels()
            .map(|pixel| pixel.0.map(|channel| channel >> 3))
            .collect::<HashSet<_>>()
            .len()
    }

    /// Share of pixels that differ, 0 to 1.
    #[must_use]
    pub fn difference(&self, other: &Self) -> f64 {
        if self.0.dimensions() != other.0.dimensions() {
            return 1.0;
        }
        let pairs = self.0.pixels().zip(other.0.pixels());
        let different = pairs.filter(|(a, b)| a != b).count();
        let all = u64::from(self.0.width()) * u64::from(self.0.height());
        #[expect(clippy::cast_precision_loss, reason = "a screen has few pixels")]
        let share = different as f64 / all as f64;
        share
    }

    /// Writes it as a PNG.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        self.0
            .save(path)
            .with_context(|| format!("writing {}", path.display()))
    }
}

impl std::fmt::Debug for Picture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Picture({}×{})", self.0.width(), self.0.height())
    }
}
