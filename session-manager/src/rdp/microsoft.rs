//! Plans for Microsoft's clients. Pure: the edges that carry them out are in `run.rs`.
//!
//! Neither client takes a fingerprint. The far end is a loopback address of this machine; the certificate was compared
//! by the orchestrator before it said `ready`. A relay that compares it on the way is planned (DESIGN §6).

use crate::view::RdpOptions;
use mayfly_api::{Credentials, RdpEndpoint};
use secrecy::SecretString;

/// What starts `mstsc`.
#[derive(Clone, Debug)]
pub struct MstscPlan {
    /// Text of the `.rdp` file: no secret in it.
    pub file: String,
    /// Target of the Credential Manager entry: `TERMSRV/` and the address without its port.
    pub credential_target: String,
    /// User of the entry.
    pub user: String,
    /// Password of the entry. Removed when the client has ended.
    pub password: SecretString,
}

/// The plan for `mstsc`.
#[must_use]
pub fn mstsc_plan(
    endpoint: &RdpEndpoint,
    credentials: &Credentials,
    options: &RdpOptions,
) -> MstscPlan {
    MstscPlan {
        file: rdp_file(endpoint, credentials, options),
        credential_target: format!("TERMSRV/{}", endpoint.address.ip()),
        user: credentials.user.clone(),
        password: credentials.password.clone(),
    }
}

/// What starts the "Windows App" on macOS. It asks for the password: there is no way to hand it over.
#[derive(Clone, Debug)]
pub struct MacPlan {
    /// Text of the `.rdp` file.
    pub file: String,
    /// Arguments of `/usr/bin/open`, to be followed by the file.
    pub open_args: Vec<String>,
}

/// The plan for the "Windows App".
#[must_use]
pub fn macos_plan(
    endpoint: &RdpEndpoint,
    credentials: &Credentials,
    options: &RdpOptions,
) -> MacPlan {
    MacPlan {
        file: rdp_file(endpoint, credentials, options),
        // -W: `open` stays until the app is left; -n: an instance of its own.
        open_args: ["-W", "-n", "-a", "Windows App"]
            .map(str::to_owned)
            .to_vec(),
    }
}

fn rdp_file(endpoint: &RdpEndpoint, credentials: &Credentials, options: &RdpOptions) -> String {
    let on = u8::from;
    let lines = [
        format!("full address:s:{}", endpoint.address),
        format!("username:s:{}", credentials.user),
        // The desktop asks those who have a password of their own.
        "prompt for credentials:i:0".to_owned(),
        "authentication level:i:0".to_owned(),
        "enablecredsspsupport:i:0".to_owned(),
        "negotiate security layer:i:1".to_owned(),
        format!(
            "screen mode id:i:{}",
            if options.full_screen { 2 } else { 1 }
        ),
        format!("use multimon:i:{}", on(options.multi_monitor)),
        "dynamic resolution:i:1".to_owned(),
        format!("redirectclipboard:i:{}", on(options.clipboard)),
        "redirectprinters:i:0".to_owned(),
        "redirectsmartcards:i:0".to_owned(),
        "drivestoredirect:s:".to_owned(),
        format!("audiomode:i:{}", if options.sound { 0 } else { 2 }),
        "autoreconnection enabled:i:1".to_owned(),
        "bitmapcachepersistenable:i:0".to_owned(),
    ];
    lines.join("\r\n") + "\r\n"
}

#[cfg(test)]
mod tests {
    use super::super::freerdp::tests::{credentials, endpoint};
    use super::*;

    #[test]
    fn an_rdp_file_holds_settings_and_no_secret() {
        let plan = mstsc_plan(&endpoint(), &credentials(), &RdpOptions::default());
        for line in [
            "full address:s:127.77.0.5:3389",
            "username:s:user",
            "redirectclipboard:i:1",
            "screen mode id:i:1",
            "audiomode:i:2",
        ] {
            assert!(plan.file.split("\r\n").any(|l| l == line), "{line}");
        }
        assert!(plan.file.ends_with("\r\n"));
        assert!(!plan.file.contains("S3cret"));
        assert!(!format!("{plan:?}").contains("S3cret"));
        assert_eq!(plan.credential_target, "TERMSRV/127.77.0.5");
        assert_eq!(plan.user, "user");
    }

    #[test]
    fn the_windows_app_gets_a_file_without_a_secret() {
        let plan = macos_plan(&endpoint(), &credentials(), &RdpOptions::default());
        assert_eq!(plan.open_args, ["-W", "-n", "-a", "Windows App"]);
        assert!(!plan.file.contains("S3cret"));
    }
}
