//! A person's graphical session: screen, D-Bus, a panel that holds tray icons, notifications, an unlocked keyring.
//!
//! Everything is the real program (Xvfb, dbus-daemon, xfce4-panel, dunst, gnome-keyring), and nothing of it is the
//! session of whoever runs the tests: the bus knows no services but the panel's configuration.

use super::{Lab, Process, Screen, until};
use anyhow::{Context, Result};
use futures_util::StreamExt;
use std::collections::HashMap;
use std::fs;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use zbus::fdo::{DBusProxy, MonitoringProxy};
use zbus::names::BusName;
use zbus::zvariant::OwnedValue;
use zbus::{Connection, MatchRule, MessageStream, message};

/// A part of the session is up within this.
const START: Duration = Duration::from_secs(30);

/// A person's graphical session. Dropping it ends it, the screen last.
#[derive(Debug)]
pub struct Desk {
    parts: Vec<Process>,
    bus: Connection,
    address: String,
    notifications: Arc<Mutex<Vec<Notification>>>,
    _daemon: Process,
    screen: Screen,
}

/// A notification as its daemon received it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notification {
    /// Name of the program that sent it.
    pub app: String,
    /// First line.
    pub summary: String,
    /// The rest.
    pub body: String,
    /// Labels of its buttons.
    pub actions: Vec<String>,
}

impl Desk {
    /// Starts the session and waits until every part of it is there.
    ///
    /// # Errors
    /// When a program is missing (`cargo xtask test packages` installs them) or does not come up.
    pub async fn start(lab: &Lab) -> Result<Self> {
        let screen = Screen::start(lab).await?;
        let address = format!("unix:path={}", lab.path("run/bus").display());
        write_configuration(lab, &address)?;
        let mut daemon = lab.command("dbus-daemon");
        daemon
            .arg("--config-file")
            .arg(lab.path("config/bus.conf"))
            .args(["--nofork", "--nopidfile"])
            .env("DISPLAY", screen.display())
            .env("DBUS_SESSION_BUS_ADDRESS", &address);
        let mut daemon = lab.start("dbus", daemon)?;
        let bus = until("the D-Bus session answers", START, async || {
            daemon.must_run()?;
            Ok(connect(&address).await.ok())
        })
        .await?;
        let mut desk = Self {
            parts: Vec::new(),
            notifications: watch_notifications(&address).await?,
            bus,
            address,
            _daemon: daemon,
            screen,
        };
        // One after the other: xfce4-panel would answer for notifications otherwise.
        desk.part(lab, "dunst", &[], "org.freedesktop.Notifications")
            .await?;
        desk.part(
            lab,
            "gnome-keyring-daemon",
            &["--foreground", "--unlock", "--components=secrets"],
            "org.freedesktop.secrets",
        )
        .await?;
        desk.part(
            lab,
            "xfce4-panel",
            &["--disable-wm-check"],
            "org.kde.StatusNotifierWatcher",
        )
        .await?;
        Ok(desk)
    }

    /// Starts a program of the session and waits until it owns its name on the bus.
    async fn part(&mut self, lab: &Lab, program: &str, args: &[&str], name: &str) -> Result<()> {
        let mut command = lab.command(program);
        command.args(args);
        self.environment(&mut command);
        // Only the keyring reads it: the password that it is unlocked with.
        let mut process = lab.start_with_input(program, command, b"mayfly-lab\n")?;
        let what = format!("{program} answers as {name}");
        until(&what, START, async || {
            process.must_run()?;
            Ok(self.owns(name).await?.then_some(()))
        })
        .await?;
        self.parts.push(process);
        Ok(())
    }

    async fn owns(&self, name: &str) -> Result<bool> {
        let daemon = DBusProxy::new(&self.bus).await?;
        Ok(daemon.name_has_owner(BusName::try_from(name)?).await?)
    }

    /// Puts a command into this session: display, bus.
    pub fn environment(&self, command: &mut Command) {
        command
            .env("DISPLAY", self.screen.display())
            .env("DBUS_SESSION_BUS_ADDRESS", &self.address)
            .env("XDG_CURRENT_DESKTOP", "XFCE")
            .env("GDK_BACKEND", "x11")
            .env("LIBGL_ALWAYS_SOFTWARE", "1");
    }

    /// The screen.
    #[must_use]
    pub fn screen(&self) -> &Screen {
        &self.screen
    }

    /// The session's bus.
    pub fn bus(&self) -> &Connection {
        &self.bus
    }

    /// A connection of its own to the session's bus, for whoever takes a name there.
    pub(super) async fn connect(&self) -> zbus::Result<Connection> {
        connect(&self.address).await
    }

    /// Every notification so far, oldest first.
    #[must_use]
    pub fn notifications(&self) -> Vec<Notification> {
        self.notifications
            .lock()
            .map(|notes| notes.clone())
            .unwrap_or_default()
    }

    /// Ends a part of the session, as if the person had none: `dunst`, `gnome-keyring-daemon`, `xfce4-panel`.
    pub fn without(&mut self, program: &str) {
        self.parts.retain(|part| part.name() != program);
    }
}

async fn connect(address: &str) -> zbus::Result<Connection> {
    zbus::connection::Builder::address(address)?.build().await
}

/// Reads along on the bus, which disturbs neither the sender nor the daemon.
async fn watch_notifications(address: &str) -> Result<Arc<Mutex<Vec<Notification>>>> {
    let listener = connect(address).await?;
    let rule = MatchRule::builder()
        .msg_type(message::Type::MethodCall)
        .interface("org.freedesktop.Notifications")?
        .member("Notify")?
        .build();
    MonitoringProxy::new(&listener)
        .await?
        .become_monitor(&[rule], 0)
        .await
        .context("listening for notifications")?;
    let notes = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&notes);
    let mut messages = MessageStream::from(&listener);
    tokio::spawn(async move {
        while let Some(Ok(message)) = messages.next().await {
            if let Some(note) = read_notification(&message)
                && let Ok(mut heard) = heard.lock()
            {
                heard.push(note);
            }
        }
    });
    Ok(notes)
}

fn read_notification(message: &zbus::Message) -> Option<Notification> {
    type Notify = (
        String,
        u32,
        String,
        String,
        String,
        Vec<String>,
        HashMap<String, OwnedValue>,
        i32,
    );
    let (app, _, _, summary, body, actions, _, _): Notify = message.body().deserialize().ok()?;
    Some(Notification {
        app,
        summary,
        body,
        // Key and label by turns.
        actions: actions.into_iter().skip(1).step_by(2).collect(),
    })
}

fn write_configuration(lab: &Lab, address: &str) -> Result<()> {
    let services = lab.path("config/services");
    let panel = lab.path("config/xfce4/xfconf/xfce-perchannel-xml");
    for folder in [&services, &panel] {
        fs::create_dir_all(folder)?;
    }
    // Only the panel's configuration is started on demand. Everything else is there because it was started, or is not there.
    let xfconf = "/usr/share/dbus-1/services/org.xfce.Xfconf.service";
    fs::copy(xfconf, services.join("org.xfce.Xfconf.service"))
        .with_context(|| format!("copying {xfconf} (package xfconf)"))?;
    fs::write(
        lab.path("config/bus.conf"),
        format!(
            r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>{address}</listen>
  <servicedir>{}</servicedir>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
  </policy>
</busconfig>
"#,
            services.display()
        ),
    )?;
    fs::write(
        panel.join("xfce4-panel.xml"),
        r#"<?xml version="1.0" encoding="UTF-8"?>
<channel name="xfce4-panel" version="1.0">
  <property name="configver" type="int" value="2"/>
  <property name="panels" type="array">
    <value type="int" value="1"/>
    <property name="panel-1" type="empty">
      <property name="position" type="string" value="p=6;x=0;y=0"/>
      <property name="position-locked" type="bool" value="true"/>
      <property name="length" type="uint" value="100"/>
      <property name="size" type="uint" value="28"/>
      <property name="plugin-ids" type="array">
        <value type="int" value="1"/>
      </property>
    </property>
  </property>
  <property name="plugins" type="empty">
    <property name="plugin-1" type="string" value="systray"/>
  </property>
</channel>
"#,
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_session_has_screen_panel_notifications_and_keyring_and_leaves_nothing() {
        let lab = Lab::new("desk").unwrap();
        let desk = Desk::start(&lab).await.unwrap();

        let before = desk.screen().picture().unwrap();
        let hints: HashMap<&str, zbus::zvariant::Value<'_>> = HashMap::new();
        let note = (
            "Mayfly",
            0_u32,
            "",
            "Ready",
            "Your desktop",
            vec!["k", "Open"],
            hints,
            0_i32,
        );
        let name = "org.freedesktop.Notifications";
        desk.bus()
            .call_method(
                Some(name),
                "/org/freedesktop/Notifications",
                Some(name),
                "Notify",
                &note,
            )
            .await
            .unwrap();
        let seen = until("the notification is heard and drawn", START, async || {
            let drawn = desk.screen().picture()?.difference(&before) > 0.002;
            Ok(desk.notifications().pop().filter(|_| drawn))
        });
        assert_eq!(
            seen.await.unwrap(),
            Notification {
                app: "Mayfly".into(),
                summary: "Ready".into(),
                body: "Your desktop".into(),
                actions: vec!["Open".into()],
            }
        );
        assert!(desk.owns("org.freedesktop.secrets").await.unwrap());

        let number = desk.screen().display().trim_start_matches(':');
        let socket = std::path::PathBuf::from(format!("/tmp/.X11-unix/X{number}"));
        assert!(socket.exists());
        drop(desk);
        assert!(!socket.exists());
        assert!(lab.leftovers().is_empty(), "{}", lab.leftovers());
    }
}
