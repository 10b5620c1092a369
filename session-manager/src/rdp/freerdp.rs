//! The command line of `FreeRDP`. The password goes through standard input and nowhere else: arguments are public.

use super::{Client, Flavour};
use crate::view::RdpOptions;
use mayfly_api::{Credentials, RdpEndpoint};
use secrecy::{ExposeSecret, SecretString};
use std::path::PathBuf;

/// A program, its public arguments, and what is written to its standard input.
#[derive(Clone, Debug)]
pub struct Command {
    /// The program.
    pub program: PathBuf,
    /// Arguments; everybody on the machine can read them.
    pub args: Vec<String>,
    /// Standard input, closed after it.
    pub stdin: SecretString,
}

/// The command that opens `endpoint` with a window titled `title`.
///
/// # Guarantees
/// * Nothing of the password is in `args`.
/// * Only TLS is accepted (`/sec:tls`), and only the announced certificate: a machine in the middle can offer neither
///   weak RDP security nor a certificate of its own.
#[must_use]
pub fn freerdp_command(
    client: &Client,
    endpoint: &RdpEndpoint,
    credentials: &Credentials,
    title: &str,
    options: &RdpOptions,
) -> Command {
    let pairs: Vec<&str> = (0..endpoint.certificate_sha256.len() / 2)
        .filter_map(|i| endpoint.certificate_sha256.get(2 * i..2 * i + 2))
        .collect();
    let mut args = vec![
        format!("/v:{}", endpoint.address),
        format!("/u:{}", credentials.user),
        "/d:".to_owned(),
        "/sec:tls".to_owned(),
        format!("/cert:deny,fingerprint:sha256:{}", pairs.join(":")),
        format!("/t:{title}"),
        "/network:auto".to_owned(),
        "+auto-reconnect".to_owned(),
        "/auto-reconnect-max-retries:3".to_owned(),
        "/log-level:WARN".to_owned(),
        if options.clipboard {
            "+clipboard"
        } else {
            "-clipboard"
        }
        .to_owned(),
    ];
    if options.full_screen {
        args.push("/f".to_owned());
    } else if !is_sdl(client) {
        args.push("/size:85%".to_owned());
    }
    if options.multi_monitor {
        args.push("/multimon".to_owned());
    }
    if options.sound {
        args.push("/sound".to_owned());
    }
    let password = credentials.password.expose_secret();
    // A person of a domain has a password of their own, and the desktop's login screen asks for it.
    let asked_there = password.is_empty();
    match client.flavour {
        Flavour::FreeRdp2 => {
            args.push("/dynamic-resolution".to_owned());
            // Plain /from-stdin is not read when the server, as xrdp, asks for no network level authentication.
            if !asked_there {
                args.push("/from-stdin:force".to_owned());
            }
            Command {
                program: client.path.clone(),
                args,
                stdin: format!("{password}\n").into(),
            }
        }
        _ => {
            args.push("+dynamic-resolution".to_owned());
            if !asked_there {
                args.push(format!("/p:{password}"));
            }
            Command {
                program: client.path.clone(),
                args: vec!["/args-from:stdin".to_owned()],
                stdin: format!("{}\n", args.join("\n")).into(),
            }
        }
    }
}

fn is_sdl(client: &Client) -> bool {
    client
        .path
        .file_name()
        .is_some_and(|name| name.to_string_lossy().starts_with("sdl"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn endpoint() -> RdpEndpoint {
        RdpEndpoint {
            address: "127.77.0.5:3389".parse().unwrap(),
            certificate_sha256: "0123456789abcdef".repeat(4),
            user: "user".into(),
        }
    }

    pub(crate) fn credentials() -> Credentials {
        Credentials {
            user: "user".into(),
            password: "S3cret pass".into(),
        }
    }

    fn client(path: &str, flavour: Flavour) -> Client {
        Client {
            path: path.into(),
            flavour,
            version: String::new(),
        }
    }

    fn command(client: &Client, options: &RdpOptions) -> Command {
        freerdp_command(
            client,
            &endpoint(),
            &credentials(),
            "desktop-000000a",
            options,
        )
    }

    #[test]
    fn a_person_of_a_domain_gives_their_password_to_the_desktop_alone() {
        let own = Credentials {
            password: String::new().into(),
            ..credentials()
        };
        for flavour in [Flavour::FreeRdp2, Flavour::FreeRdp3] {
            let client = client("/usr/bin/xfreerdp", flavour);
            let made = freerdp_command(&client, &endpoint(), &own, "", &RdpOptions::default());
            let all = format!("{:?} {}", made.args, made.stdin.expose_secret());
            assert!(
                !all.contains("/p:") && !all.contains("/from-stdin"),
                "{all}"
            );
        }
    }

    #[test]
    fn the_password_is_never_an_argument() {
        for flavour in [Flavour::FreeRdp2, Flavour::FreeRdp3] {
            let made = command(
                &client("/usr/bin/xfreerdp", flavour),
                &RdpOptions::default(),
            );
            assert!(!made.args.join(" ").contains("S3cret"), "{flavour:?}");
            assert!(!format!("{made:?}").contains("S3cret"), "{flavour:?}");
            assert!(made.stdin.expose_secret().contains("S3cret pass"));
        }
    }

    #[test]
    fn freerdp_2_gets_arguments_and_the_password_on_standard_input() {
        let made = command(
            &client("/usr/bin/xfreerdp", Flavour::FreeRdp2),
            &RdpOptions::default(),
        );
        assert_eq!(made.args[0], "/v:127.77.0.5:3389");
        let pin = "/cert:deny,fingerprint:sha256:01:23:45:67:89:ab:cd:ef:01:23:45:67:89:ab:cd:ef:01:23:45:67:89:ab:cd:ef:01:23:45:67:89:ab:cd:ef";
        for wanted in [
            pin,
            "/sec:tls",
            "/from-stdin:force",
            "/t:desktop-000000a",
            "+clipboard",
        ] {
            assert!(made.args.iter().any(|a| a == wanted), "{wanted}");
        }
        assert_eq!(made.stdin.expose_secret(), "S3cret pass\n");
    }

    #[test]
    fn freerdp_3_gets_everything_on_standard_input() {
        let made = command(
            &client("/usr/bin/sdl-freerdp3", Flavour::FreeRdp3),
            &RdpOptions {
                full_screen: true,
                multi_monitor: true,
                sound: true,
                clipboard: true,
                client: None,
            },
        );
        assert_eq!(made.args, ["/args-from:stdin"]);
        let text = made.stdin.expose_secret();
        let lines: Vec<_> = text.lines().collect();
        for wanted in ["/p:S3cret pass", "/f", "/multimon", "/sound", "+clipboard"] {
            assert!(lines.contains(&wanted), "{wanted}");
        }
        // FreeRDP stops reading at an empty line.
        assert!(lines.iter().all(|line| !line.is_empty()));
    }
}
