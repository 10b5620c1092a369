//! What a window, a tray menu or a terminal shows: plain data, computed from the state alone.
//!
//! Words are not here: a [`Message`] names an entry of the Fluent catalogue (`locales/*/mayfly.ftl`), and whoever
//! shows it (Rust for tray, notifications and terminal, TypeScript for the windows) looks it up in the person's language.

use mayfly_api::StageName;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use ts_rs::TS;

/// An entry of the catalogue with its arguments.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, TS)]
pub struct Message {
    /// Fluent message id.
    pub id: String,
    /// Fluent arguments.
    #[serde(default)]
    pub args: BTreeMap<String, Arg>,
}

/// An argument of a [`Message`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, TS)]
#[serde(untagged)]
pub enum Arg {
    /// A number, for plurals.
    Number(i32),
    /// A text: a name, an address, the orchestrator's own words.
    Text(String),
}

impl Message {
    /// The entry `id`, without arguments.
    #[must_use]
    pub fn new(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            args: BTreeMap::new(),
        }
    }

    /// With a text argument.
    #[must_use]
    pub fn text(mut self, name: &str, value: impl std::fmt::Display) -> Self {
        self.args
            .insert(name.to_owned(), Arg::Text(value.to_string()));
        self
    }

    /// With a number argument, which may choose a plural.
    #[must_use]
    pub fn number(mut self, name: &str, value: u32) -> Self {
        let value = i32::try_from(value).unwrap_or(i32::MAX);
        self.args.insert(name.to_owned(), Arg::Number(value));
        self
    }
}

/// What a person can ask for; the id of every button and menu item.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, TS)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Ask for a desktop.
    NewDesktop,
    /// Stop making it; destroys what was made.
    Cancel,
    /// Open the RDP client again.
    Reconnect,
    /// Stop the countdown; keep the desktop without a client.
    Keep,
    /// Destroy now.
    Destroy,
    /// Try the step that failed again.
    Retry,
    /// Back to the start after an end or an error.
    Dismiss,
    /// Show the window.
    OpenWindow,
    /// Show the settings.
    OpenSettings,
    /// Destroy what lives, then leave.
    Quit,
}

/// A line of the tray menu.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, TS)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum MenuEntry {
    /// Text that cannot be chosen: the status.
    Status {
        /// Its words.
        label: Message,
    },
    /// Something to choose.
    Item {
        /// Its words.
        label: Message,
        /// What it does.
        action: Action,
    },
    /// A line.
    Separator,
}

/// Look of the tray icon; never told by colour alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, TS)]
#[serde(rename_all = "snake_case")]
pub enum TrayIcon {
    /// No desktop.
    Idle,
    /// Work is under way.
    Busy,
    /// A desktop lives.
    Active,
    /// Something needs the person.
    Attention,
}

/// Where a stage stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, TS)]
#[serde(rename_all = "snake_case")]
pub enum StageStatus {
    /// Not begun.
    Pending,
    /// Under way.
    Current,
    /// Over.
    Done,
    /// The step that failed.
    Failed,
}

/// A stage in the progress window.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, TS)]
pub struct StageView {
    /// Which; its words are `stage-<name>` in the catalogue.
    #[ts(type = "string")]
    pub name: StageName,
    /// Where it stands.
    pub status: StageStatus,
    /// How long it took or has taken, in milliseconds.
    #[ts(type = "number | null")]
    pub elapsed_ms: Option<u64>,
}

/// What the window shows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, TS)]
#[serde(tag = "screen", rename_all = "snake_case")]
pub enum Screen {
    /// No desktop. Actions: [`Action::NewDesktop`].
    Home {
        /// What just happened ("Your desktop was destroyed"), if anything.
        notice: Option<Message>,
    },
    /// A desktop is being made, or the RDP client is being opened. Action: [`Action::Cancel`].
    Progress {
        /// The stage's words.
        headline: Message,
        /// What the stage is at, where more is known; may change every second.
        detail: Option<Message>,
        /// All stages.
        stages: Vec<StageView>,
        /// Part done, 0 to 1, never going back.
        fraction: f32,
        /// Since the request, in milliseconds.
        #[ts(type = "number")]
        elapsed_ms: u64,
        /// Usual time in all, in milliseconds.
        #[ts(type = "number | null")]
        expected_ms: Option<u64>,
        /// "Longer than usual", "the orchestrator does not answer, trying again", the place in the queue.
        hint: Option<Message>,
    },
    /// The RDP client is open, or the desktop is kept without one. Actions: reconnect (without client), destroy.
    InUse {
        /// Its words.
        headline: Message,
        /// More words: until when it is kept, the connection was lost, …
        hint: Option<Message>,
        /// Where to connect by hand.
        address: Option<String>,
        /// Whether an RDP client of ours runs.
        client_open: bool,
    },
    /// The client was closed. Actions: reconnect (default), keep, destroy.
    Countdown {
        /// Why.
        reason: Message,
        /// Seconds left; absent when the countdown is "never".
        remaining_s: Option<u32>,
        /// Seconds at its start.
        total_s: Option<u32>,
    },
    /// The desktop is being destroyed.
    Ending {
        /// Its words.
        headline: Message,
        /// Since it was asked, in milliseconds.
        #[ts(type = "number")]
        elapsed_ms: u64,
    },
    /// Something failed. Actions: the ones listed, first the default.
    Error {
        /// What failed.
        headline: Message,
        /// What to do.
        hint: Message,
        /// The step that failed, with what came before; none if every step was done before it failed.
        stages: Vec<StageView>,
        /// For "Copy diagnostics": plain text without secrets.
        diagnostics: String,
        /// What can be done.
        actions: Vec<Action>,
        /// Where to connect by hand, if a desktop lives.
        address: Option<String>,
    },
}

/// The whole picture. The windows get it whole after every change, first on opening.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, TS)]
pub struct View {
    /// The window.
    pub screen: Screen,
    /// `en` or `fr`.
    pub language: String,
    /// Where secrets are kept: a message if only in memory.
    pub secrets_notice: Option<Message>,
}

/// What a person sets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, TS)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Address of the orchestrator.
    pub orchestrator: String,
    /// From closing the client to the end.
    pub countdown: Countdown,
    /// `en`, `fr`, or absent: the system's.
    pub language: Option<String>,
    /// Options of the RDP client.
    pub rdp: RdpOptions,
}

/// From closing the client to the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, TS)]
pub enum Countdown {
    /// Ten seconds.
    #[default]
    #[serde(rename = "10s")]
    TenSeconds,
    /// Thirty seconds.
    #[serde(rename = "30s")]
    ThirtySeconds,
    /// Two minutes.
    #[serde(rename = "2min")]
    TwoMinutes,
    /// Keep the desktop until the person decides, as long as the template allows.
    #[serde(rename = "never")]
    Never,
}

/// Options of the RDP client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, TS)]
#[serde(deny_unknown_fields, default)]
pub struct RdpOptions {
    /// Path of the client; absent: the best one found.
    pub client: Option<String>,
    /// Fill the screen.
    pub full_screen: bool,
    /// Use every monitor.
    pub multi_monitor: bool,
    /// Share the clipboard.
    pub clipboard: bool,
    /// Play the desktop's sound here.
    pub sound: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            orchestrator: "http://127.0.0.1:5000".to_owned(),
            countdown: Countdown::default(),
            language: None,
            rdp: RdpOptions::default(),
        }
    }
}

impl Default for RdpOptions {
    fn default() -> Self {
        Self {
            client: None,
            full_screen: false,
            multi_monitor: false,
            clipboard: true,
            sound: false,
        }
    }
}
