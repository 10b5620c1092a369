//! Which of the person's network shares are not there. A login goes on without one whose server is down, in a folder of the desktop's
//! own that looks the same: so they are told, and the orchestrator.

use crate::presence::Presence;
use crate::talk::Event;
use mayfly_api::agent::Share;
use std::fs;
use std::sync::mpsc::Sender;
use std::thread;
use std::time::Duration;

/// Between two looks for a person.
const LOOK: Duration = Duration::from_secs(1);
/// Shares are mounted before a session begins; after this it can show a notice.
const SETTLED: Duration = Duration::from_secs(15);

/// Where the shares of this person are mounted by the program that joins the domain.
pub(crate) fn places(user: &str, shares: &[Share]) -> Vec<String> {
    let place = |share: &Share| {
        let mount = share.mount.replace("{user}", user);
        if mount.starts_with('/') {
            mount
        } else {
            format!("/home/{user}/{mount}")
        }
    };
    shares.iter().map(place).collect()
}

/// Looks after each time somebody connects. Ends when nobody listens any more.
pub(crate) fn watch(presence: &Presence, places: &[String], events: &Sender<Event>) {
    let connected = || {
        presence
            .displays()
            .values()
            .any(|connections| *connections > 0)
    };
    loop {
        while !connected() {
            thread::sleep(LOOK);
        }
        thread::sleep(SETTLED);
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let missing = missing(places, &mounts);
        if !missing.is_empty() && events.send(Event::SharesMissing(missing)).is_err() {
            return;
        }
        while connected() {
            thread::sleep(LOOK);
        }
    }
}

/// Those of the places that no network file system is mounted at (man proc: white space and backslashes are written in octal).
fn missing(places: &[String], mounts: &str) -> Vec<String> {
    let escaped = |place: &str| {
        place
            .replace('\\', "\\134")
            .replace(' ', "\\040")
            .replace('\t', "\\011")
            .replace('\n', "\\012")
    };
    let mounted = |place: &str| {
        mounts.lines().any(|line| {
            let mut fields = line.split(' ').skip(1);
            fields.next() == Some(&*escaped(place)) && fields.next() == Some("cifs")
        })
    };
    let absent = places.iter().filter(|place| !mounted(place));
    absent.cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_missing_where_no_network_file_system_is_mounted() {
        let share = |mount: &str| Share {
            server: "files".into(),
            share: "s".into(),
            mount: mount.into(),
            security: None,
            options: None,
        };
        let shares = [
            share("Partage"),
            share("Mes documents"),
            share("/srv/{user}"),
        ];
        let places = places("ada", &shares);
        assert_eq!(
            places,
            ["/home/ada/Partage", "/home/ada/Mes documents", "/srv/ada"]
        );
        let all = "tmpfs /home/ada/Partage tmpfs rw 0 0\n//f/s /home/ada/Partage cifs rw 0 0\n\
                   //f/s /home/ada/Mes\\040documents cifs rw 0 0\n//f/s /srv/ada cifs rw 0 0\n";
        assert_eq!(missing(&places, all), Vec::<String>::new());
        let one = "tmpfs /home/ada/Partage tmpfs rw 0 0\n//f/s /srv/ada cifs rw 0 0\n";
        assert_eq!(missing(&places, one), places[..2]);
    }
}
