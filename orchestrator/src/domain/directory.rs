//! Computer accounts in Active Directory, over LDAPS: made before a desktop boots, removed after it is gone.
//!
//! An account is *preset* with a one-time password, as `adcli preset-computer` does it; the desktop joins with that alone
//! (`adcli join --login-type=computer`) and changes it, so that no administrator's credential is ever in a desktop. adcli itself
//! would take the password as an argument that everybody can read, so the same is done here over LDAP.
//!
//! # Guarantees
//! * Nothing is read or written outside the configured organisational unit, and in it no account that this installation did not make.
//! * Only over TLS, to a server whose certificate is believed. Passwords are in no error.
//! * Removing an account that does not exist is no error; presetting one that exists is.
//! * Several controllers, which tell each other of changes after a while: an account is preset at the first that can be asked, and
//!   looked for and removed at each that can.
//! * A password that one of them refuses is not tried at the next: that would lock the account.
//!
//! Facts: attributes and `unicodePwd` are MS-ADTS 3.1.1.3.1.5.1 and MS-ADA3; `userAccountControl` MS-ADTS 2.2.16.

use super::DomainConfig;
use crate::trust::{Distrust, Trust, TrustError};
use jiff::civil::DateTime;
use jiff::{SignedDuration, Timestamp};
use ldap3::adapters::{Adapter, EntriesOnly, PagedResults};
use ldap3::controls::RawControl;
use ldap3::{Ldap, LdapConnAsync, LdapConnSettings, LdapError, Scope, SearchEntry, ldap_escape};
use mayfly_api::DesktopName;
use rustls::ClientConfig;
use secrecy::{ExposeSecret, SecretString};
use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;

/// Until a connection stands: with several controllers, what one that is down costs.
const CONNECT: Duration = Duration::from_secs(5);
/// For each operation.
const PATIENCE: Duration = Duration::from_secs(10);
/// Accounts of one answer.
const PAGE: i32 = 500;
/// `WORKSTATION_TRUST_ACCOUNT`
const WORKSTATION: &str = "4096";
/// `LDAP_SERVER_TREE_DELETE_OID`: a computer may have objects below it (MS-ADTS 3.1.1.3.4.1.15).
const TREE_DELETE: &str = "1.2.840.113556.1.4.805";
const INVALID_CREDENTIALS: u32 = 49;
const NO_SUCH_OBJECT: u32 = 32;
const INSUFFICIENT_RIGHTS: u32 = 50;
const ALREADY_EXISTS: u32 = 68;

/// Why the directory did not do something; says what to do.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// No server answers.
    #[error("no answer from {0}")]
    Unreachable(String),
    /// The certificate is not believed.
    #[error("the certificate of {server} is not trusted ({cause}): {advice}")]
    Certificate {
        /// The server.
        server: String,
        /// What is wrong with it.
        cause: String,
        /// What to do.
        advice: &'static str,
    },
    /// The account or its password is wrong.
    #[error(
        "the domain does not accept {account} or its password (domain.account, domain.password_file)"
    )]
    Refused {
        /// Who we are there.
        account: String,
    },
    /// The account may not do that.
    #[error(
        "{account} may not {what}: delegate creating and deleting computers, and resetting their passwords, in {ou}"
    )]
    Forbidden {
        /// Who we are there.
        account: String,
        /// What it may not do.
        what: String,
        /// Where.
        ou: String,
    },
    /// The organisational unit does not exist.
    #[error("{0} does not exist in the domain, or may not be seen (domain.ou)")]
    NoSuchUnit(String),
    /// The account exists already.
    #[error("the computer account {0} exists already")]
    Exists(DesktopName),
    /// Anything else.
    #[error("the domain: {0}")]
    Failed(String),
}

impl DirectoryError {
    /// Nothing was asked of that controller: another one may do it.
    pub(super) fn asked_nothing(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Certificate { .. })
    }
}

/// The directory of a domain.
pub struct Directory {
    servers: Vec<String>,
    domain: String,
    account: String,
    password: SecretString,
    ou: String,
    /// What marks accounts as ours: the organisational unit may hold others.
    mark: String,
    tls: Arc<ClientConfig>,
}

impl std::fmt::Debug for Directory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Directory")
            .field("servers", &self.servers)
            .field("account", &self.account)
            .finish_non_exhaustive()
    }
}

impl Directory {
    /// Connects nowhere yet.
    ///
    /// # Errors
    /// If the authority's file cannot be used.
    pub fn new(
        config: &DomainConfig,
        password: SecretString,
        installation: &str,
    ) -> Result<Self, TrustError> {
        let trust = match &config.ca_file {
            Some(file) => Trust::Authority(file.clone()),
            None => Trust::System,
        };
        Ok(Self {
            servers: config.servers.clone(),
            domain: config.name.clone(),
            account: config.account.clone(),
            password,
            ou: config.ou.clone(),
            mark: format!("Mayfly {installation}"),
            tls: Arc::new(trust.tls()?.0),
        })
    }

    /// Presets the account of a desktop, and says at which controller: the others learn of it later.
    ///
    /// # Errors
    /// See [`DirectoryError`]; [`DirectoryError::Exists`] if there is one.
    pub async fn preset(
        &self,
        name: DesktopName,
        password: &SecretString,
    ) -> Result<String, DirectoryError> {
        let (server, mut ldap) = self.first().await?;
        let netbios = name.to_string().to_uppercase();
        let host = format!("{name}.{}", self.domain);
        let attributes = [
            ("objectClass", vec!["computer".to_owned()]),
            ("sAMAccountName", vec![format!("{netbios}$")]),
            ("userAccountControl", vec![WORKSTATION.to_owned()]),
            ("dNSHostName", vec![host.clone()]),
            (
                "servicePrincipalName",
                vec![
                    format!("HOST/{netbios}"),
                    format!("HOST/{host}"),
                    format!("RestrictedKrbHost/{netbios}"),
                    format!("RestrictedKrbHost/{host}"),
                ],
            ),
            // AES alone (MS-KILE 2.2.7).
            ("msDS-SupportedEncryptionTypes", vec!["24".to_owned()]),
            ("description", vec![self.mark.clone()]),
        ];
        let mut attributes: Vec<(Vec<u8>, HashSet<Vec<u8>>)> = attributes
            .into_iter()
            .map(|(name, values)| {
                let values = values.into_iter().map(String::into_bytes).collect();
                (name.into(), values)
            })
            .collect();
        attributes.push((
            "unicodePwd".into(),
            HashSet::from([unicode_password(password)]),
        ));
        let added = ldap
            .with_timeout(PATIENCE)
            .add(&self.dn(name), attributes)
            .await;
        let outcome = match added {
            Err(error) => Err(self.failed(&error)),
            Ok(result) => match result.rc {
                0 => Ok(server.to_owned()),
                ALREADY_EXISTS => Err(DirectoryError::Exists(name)),
                rc => Err(self.said(rc, &result.text, "create a computer account")),
            },
        };
        let _ = ldap.unbind().await;
        outcome
    }

    /// Removes the account of a desktop; `false` if there was none.
    ///
    /// # Errors
    /// See [`DirectoryError`].
    pub async fn remove(&self, name: DesktopName) -> Result<bool, DirectoryError> {
        let mut was_there = false;
        for mut ldap in self.all().await? {
            was_there |= self.remove_by(&mut ldap, name).await?;
            let _ = ldap.unbind().await;
        }
        Ok(was_there)
    }

    async fn remove_by(&self, ldap: &mut Ldap, name: DesktopName) -> Result<bool, DirectoryError> {
        let found = self.find(ldap, &self.account_of(name)).await?;
        for (dn, _) in &found {
            let tree = RawControl {
                ctype: TREE_DELETE.to_owned(),
                crit: true,
                val: None,
            };
            let deleted = ldap
                .with_timeout(PATIENCE)
                .with_controls(tree)
                .delete(dn)
                .await
                .map_err(|error| self.failed(&error))?;
            match deleted.rc {
                0 | NO_SUCH_OBJECT => {}
                // Deleting a tree is a right of its own; the account alone may do.
                _ => {
                    let deleted = ldap
                        .with_timeout(PATIENCE)
                        .delete(dn)
                        .await
                        .map_err(|error| self.failed(&error))?;
                    if !matches!(deleted.rc, 0 | NO_SUCH_OBJECT) {
                        return Err(self.said(
                            deleted.rc,
                            &deleted.text,
                            "delete a computer account",
                        ));
                    }
                }
            }
        }
        let left = self.find(ldap, &self.account_of(name)).await?;
        if left.is_empty() {
            Ok(!found.is_empty())
        } else {
            Err(DirectoryError::Failed(format!(
                "the account of {name} is there after its removal"
            )))
        }
    }

    /// Whether a desktop has an account.
    ///
    /// # Errors
    /// See [`DirectoryError`].
    pub async fn exists(&self, name: DesktopName) -> Result<bool, DirectoryError> {
        Ok(!self.accounts(&self.account_of(name)).await?.is_empty())
    }

    /// The desktops that have an account in the unit.
    ///
    /// # Errors
    /// See [`DirectoryError`].
    pub async fn list(&self) -> Result<BTreeSet<DesktopName>, DirectoryError> {
        let accounts = self.accounts(&self.filter("DESKTOP-*")).await?;
        Ok(accounts
            .into_iter()
            .filter_map(|account| account.trim_end_matches('$').to_lowercase().parse().ok())
            .collect())
    }

    /// What each controller has that can be asked.
    async fn accounts(&self, filter: &str) -> Result<Vec<String>, DirectoryError> {
        let mut accounts = Vec::new();
        for mut ldap in self.all().await? {
            let found = self.find(&mut ldap, filter).await?;
            accounts.extend(found.into_iter().map(|(_, account)| account));
            let _ = ldap.unbind().await;
        }
        Ok(accounts)
    }

    /// Looks at what desktops will need of each controller (an account that is accepted, the unit), and says how far its clock is
    /// from this machine's. In order, up to one that refuses the account.
    pub async fn check(&self) -> Vec<(String, Result<SignedDuration, DirectoryError>)> {
        let mut looked = Vec::new();
        for server in &self.servers {
            let found = self.check_at(server).await;
            let refused = matches!(found, Err(DirectoryError::Refused { .. }));
            looked.push((server.clone(), found));
            if refused {
                break;
            }
        }
        looked
    }

    async fn check_at(&self, server: &str) -> Result<SignedDuration, DirectoryError> {
        let mut ldap = self.bound_at(server).await?;
        let unit = ldap
            .with_timeout(PATIENCE)
            .search(&self.ou, Scope::Base, "(objectClass=*)", ["dn"])
            .await
            .map_err(|error| self.failed(&error))?;
        match unit.1.rc {
            0 if !unit.0.is_empty() => {}
            0 | NO_SUCH_OBJECT => return Err(DirectoryError::NoSuchUnit(self.ou.clone())),
            rc => return Err(self.said(rc, &unit.1.text, "look into its unit")),
        }
        let root = ldap
            .with_timeout(PATIENCE)
            .search("", Scope::Base, "(objectClass=*)", ["currentTime"])
            .await
            .and_then(ldap3::SearchResult::success)
            .map_err(|error| self.failed(&error))?;
        let _ = ldap.unbind().await;
        let told = root.0.into_iter().next().map(SearchEntry::construct);
        let told = told.and_then(|entry| entry.attrs.get("currentTime")?.first().cloned());
        let theirs = told
            .as_deref()
            .and_then(generalized_time)
            .ok_or_else(|| DirectoryError::Failed(format!("{server} does not tell its time")))?;
        Ok(Timestamp::now().duration_since(theirs))
    }

    /// Ours alone: Windows, too, calls machines DESKTOP- and seven letters and digits.
    fn filter(&self, account: &str) -> String {
        format!(
            "(&(objectClass=computer)(sAMAccountName={account})(description={}))",
            ldap_escape(&*self.mark)
        )
    }

    fn account_of(&self, name: DesktopName) -> String {
        self.filter(&format!("{}$", name.to_string().to_uppercase()))
    }

    fn dn(&self, name: DesktopName) -> String {
        format!("CN={},{}", name.to_string().to_uppercase(), self.ou)
    }

    /// DN and `sAMAccountName` of what the filter finds in the unit.
    async fn find(
        &self,
        ldap: &mut Ldap,
        filter: &str,
    ) -> Result<Vec<(String, String)>, DirectoryError> {
        // Active Directory answers a thousand at most without pages.
        let pages: Vec<Box<dyn Adapter<_, _>>> = vec![
            Box::new(EntriesOnly::new()),
            Box::new(PagedResults::new(PAGE)),
        ];
        let mut found = ldap
            .with_timeout(PATIENCE)
            .streaming_search_with(
                pages,
                &self.ou,
                Scope::OneLevel,
                filter,
                vec!["sAMAccountName"],
            )
            .await
            .map_err(|error| self.failed(&error))?;
        let mut accounts = Vec::new();
        while let Some(entry) = found.next().await.map_err(|error| self.failed(&error))? {
            let entry = SearchEntry::construct(entry);
            let account = entry.attrs.get("sAMAccountName").and_then(|v| v.first());
            accounts.extend(account.map(|account| (entry.dn.clone(), account.clone())));
        }
        let end = found.finish().await;
        match end.rc {
            0 => Ok(accounts),
            NO_SUCH_OBJECT => Err(DirectoryError::NoSuchUnit(self.ou.clone())),
            rc => Err(self.said(rc, &end.text, "look into its unit")),
        }
    }

    /// A connection to the first controller that can be asked, and its name.
    async fn first(&self) -> Result<(&str, Ldap), DirectoryError> {
        let mut last = none();
        for server in &self.servers {
            match self.bound_at(server).await {
                Err(error) if error.asked_nothing() => last = error,
                bound => return Ok((server, bound?)),
            }
        }
        Err(last)
    }

    /// A connection to each controller that can be asked: one at least.
    async fn all(&self) -> Result<Vec<Ldap>, DirectoryError> {
        let mut last = none();
        let mut all = Vec::new();
        for server in &self.servers {
            match self.bound_at(server).await {
                Err(error) if error.asked_nothing() => last = error,
                bound => all.push(bound?),
            }
        }
        if all.is_empty() { Err(last) } else { Ok(all) }
    }

    async fn bound_at(&self, server: &str) -> Result<Ldap, DirectoryError> {
        let settings = LdapConnSettings::new()
            .set_conn_timeout(CONNECT)
            .set_config(self.tls.clone());
        let url = format!("ldaps://{server}");
        let (connection, mut ldap) = match LdapConnAsync::with_settings(settings, &url).await {
            Ok(pair) => pair,
            Err(error) => return Err(unconnected(server, &error)),
        };
        ldap3::drive!(connection);
        let bound = ldap
            .with_timeout(PATIENCE)
            .simple_bind(&self.account, self.password.expose_secret())
            .await
            .map_err(|error| self.failed(&error))?;
        match bound.rc {
            0 => Ok(ldap),
            rc => Err(self.said(rc, &bound.text, "log in")),
        }
    }

    fn said(&self, rc: u32, text: &str, what: &str) -> DirectoryError {
        match rc {
            INVALID_CREDENTIALS => DirectoryError::Refused {
                account: self.account.clone(),
            },
            INSUFFICIENT_RIGHTS => DirectoryError::Forbidden {
                account: self.account.clone(),
                what: what.to_owned(),
                ou: self.ou.clone(),
            },
            NO_SUCH_OBJECT => DirectoryError::NoSuchUnit(self.ou.clone()),
            _ => DirectoryError::Failed(format!("could not {what}: LDAP result {rc} ({text})")),
        }
    }

    #[allow(clippy::unused_self, reason = "beside `said`")]
    fn failed(&self, error: &LdapError) -> DirectoryError {
        match error {
            LdapError::Timeout { .. } => {
                DirectoryError::Unreachable(format!("the domain within {} s", PATIENCE.as_secs()))
            }
            LdapError::Io { source } => {
                DirectoryError::Unreachable(format!("the domain: {source}"))
            }
            other => DirectoryError::Unreachable(format!("the domain: {other}")),
        }
    }
}

fn none() -> DirectoryError {
    DirectoryError::Failed("no controller is configured (domain.servers)".to_owned())
}

fn unconnected(server: &str, error: &LdapError) -> DirectoryError {
    match Distrust::of(error) {
        Some(Distrust { cause, advice }) => DirectoryError::Certificate {
            server: server.to_owned(),
            cause,
            advice: advice.unwrap_or("set domain.ca_file to the authority that signed it"),
        },
        None => DirectoryError::Unreachable(match error {
            LdapError::Timeout { .. } => {
                format!("{server}: no connection within {} s", CONNECT.as_secs())
            }
            other => format!("{server}: {other}"),
        }),
    }
}

/// In quotation marks, as UTF-16 (MS-ADTS 3.1.1.3.1.5.1).
fn unicode_password(password: &SecretString) -> Vec<u8> {
    format!("\"{}\"", password.expose_secret())
        .encode_utf16()
        .flat_map(u16::to_le_bytes)
        .collect()
}

/// `20260204120000.0Z`
fn generalized_time(text: &str) -> Option<Timestamp> {
    let time = DateTime::strptime("%Y%m%d%H%M%S", text.get(..14)?).ok()?;
    jiff::tz::TimeZone::UTC.to_timestamp(time).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_and_times_are_written_as_active_directory_does() {
        assert_eq!(
            unicode_password(&"aé".into()),
            [b'"', 0, b'a', 0, 0xe9, 0, b'"', 0]
        );
        assert_eq!(
            generalized_time("20260204120001.0Z").unwrap().to_string(),
            "2026-02-04T12:00:01Z"
        );
        assert_eq!(generalized_time("soon"), None);
    }
}
