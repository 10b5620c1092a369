//! What desktops that failed left to read ([`crate::last_words`]), as it is kept.
//!
//! # Guarantees
//! * What was kept of a desktop first stays; it is forgotten with its session.
//! * Of a session, no more than [`LONGEST`] bytes are kept: those of its latest desktops; and of all, the latest [`DESKTOPS`].

use super::StoreError;
use super::sqlite::{SqliteStore, desktop_name, moment, parse};
use crate::last_words::LONGEST;
use async_trait::async_trait;
use jiff::Timestamp;
use mayfly_api::{DesktopName, SessionId};
use std::fmt;
use std::str::FromStr;

/// A site where everything fails must not fill its disk.
const DESKTOPS: i64 = 200;

/// What one desktop left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Its session.
    pub session: SessionId,
    /// The desktop.
    pub desktop: DesktopName,
    /// When it was collected.
    pub at: Timestamp,
    /// All of it: of at most [`LONGEST`] bytes, without secrets.
    pub text: String,
}

/// Whose words are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// Those of all desktops of a session.
    Session(SessionId),
    /// Those of one desktop.
    Desktop(DesktopName),
}

impl FromStr for Whose {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let desktop = text.parse().map(Self::Desktop);
        desktop
            .or_else(|_| text.parse().map(Self::Session))
            .map_err(|_| {
                format!("{text:?} is neither the id of a session nor the name of a desktop, such as desktop-000001f")
            })
    }
}

impl fmt::Display for Whose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Session(id) => write!(f, "session {id}"),
            Self::Desktop(name) => name.fmt(f),
        }
    }
}

/// See the module.
#[async_trait]
pub trait Words: Send + Sync + 'static {
    /// Keeps what a desktop left.
    async fn keep(&self, words: &Kept) -> Result<(), StoreError>;

    /// What is kept, the earliest desktop's first.
    async fn kept(&self, whose: Whose) -> Result<Vec<Kept>, StoreError>;
}

#[async_trait]
impl Words for SqliteStore {
    async fn keep(&self, words: &Kept) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        let session = words.session.to_string();
        sqlx::query(
            "INSERT INTO log (number, session_id, at_us, text) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
        )
        .bind(words.desktop.number())
        .bind(&session)
        .bind(words.at.as_microsecond())
        .bind(&words.text)
        .execute(&mut *tx)
        .await?;
        sqlx::query(
            "DELETE FROM log WHERE number IN (
                 SELECT number FROM (
                     SELECT number, sum(length(CAST(text AS BLOB))) OVER (ORDER BY number DESC) AS bytes
                     FROM log WHERE session_id = ?)
                 WHERE bytes > ?)
             OR number IN (SELECT number FROM log ORDER BY number DESC LIMIT -1 OFFSET ?)",
        )
        .bind(&session)
        .bind(i64::try_from(LONGEST).unwrap_or(i64::MAX))
        .bind(DESKTOPS)
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(())
    }

    async fn kept(&self, whose: Whose) -> Result<Vec<Kept>, StoreError> {
        let (session, number) = match whose {
            Whose::Session(id) => (Some(id.to_string()), None),
            Whose::Desktop(name) => (None, Some(name.number())),
        };
        let rows: Vec<(String, i64, i64, String)> = sqlx::query_as(
            "SELECT session_id, number, at_us, text FROM log WHERE session_id = ? OR number = ? ORDER BY number",
        )
        .bind(session)
        .bind(number)
        .fetch_all(&self.readers)
        .await?;
        rows.into_iter()
            .map(|(session, number, at, text)| {
                Ok(Kept {
                    session: parse(&session)?,
                    desktop: desktop_name(number)?,
                    at: moment(at)?,
                    text,
                })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Limits;
    use crate::session::{Expected, Origin, Record, Wish};
    use crate::store::{Change, Store};
    use mayfly_api::EndReason;

    fn kept(session: SessionId, number: u32, text: impl Into<String>) -> Kept {
        Kept {
            session,
            desktop: DesktopName::from_number(number).unwrap(),
            at: Timestamp::from_second(1_800_000_000).unwrap(),
            text: text.into(),
        }
    }

    async fn session(store: &SqliteStore) -> SessionId {
        let wish = Wish {
            origin: Origin::V1,
            template: "t".to_owned(),
            provider: "p".to_owned(),
            user: "user".to_owned(),
            language: None,
            time_zone: None,
            keyboard: None,
        };
        let id = SessionId::new();
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let record = Record::accepted(id, wish, Expected::default(), &Limits::default(), now);
        store.accept(record, None, 100).await.unwrap();
        id
    }

    #[tokio::test]
    async fn what_a_desktop_left_is_read_by_its_name_and_by_its_session_until_that_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let store = SqliteStore::open(&path).await.unwrap();
        let (mine, other) = (session(&store).await, session(&store).await);
        let all = [
            kept(mine, 1, "first"),
            kept(mine, 3, "second"),
            kept(other, 2, "another's"),
        ];
        for words in &all {
            store.keep(words).await.unwrap();
        }
        store.keep(&kept(mine, 1, "half removed")).await.unwrap();

        let reader = SqliteStore::open_to_read(&path).await.unwrap();
        let of = async |whose: &str| reader.kept(whose.parse().unwrap()).await.unwrap();
        assert_eq!(of(&mine.to_string()).await, all[..2]);
        assert_eq!(of("desktop-0000002").await, all[2..]);
        assert_eq!(of("desktop-0000004").await, []);
        assert!(reader.keep(&all[0]).await.is_err(), "it only reads");
        reader.close().await;

        let now = Timestamp::from_second(1_800_000_001).unwrap();
        let end = |r: &mut Record| {
            r.end(EndReason::Requested, now).unwrap();
            Change::Told
        };
        store.update(mine, now, Box::new(end)).await.unwrap();
        assert_eq!(store.forget(now).await.unwrap(), 1);
        assert_eq!(store.kept(Whose::Session(mine)).await.unwrap(), []);
        assert_eq!(store.kept(Whose::Session(other)).await.unwrap().len(), 1);
    }

    #[tokio::test]
    async fn a_session_keeps_its_latest_desktops_within_the_bound() {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&dir.path().join("db")).await.unwrap();
        let (mine, other) = (session(&store).await, session(&store).await);
        store
            .keep(&kept(other, 1, "x".repeat(LONGEST)))
            .await
            .unwrap();
        // Two bytes each: it is bytes that count.
        for number in 2..6 {
            let text = "ü".repeat(LONGEST / 5);
            store.keep(&kept(mine, number, text)).await.unwrap();
        }
        let left = store.kept(Whose::Session(mine)).await.unwrap();
        let numbers: Vec<u32> = left.iter().map(|k| k.desktop.number()).collect();
        assert_eq!(numbers, [4, 5]);
        assert_eq!(store.kept(Whose::Session(other)).await.unwrap().len(), 1);
        let too_long = kept(mine, 6, "x".repeat(LONGEST + 1));
        assert!(store.keep(&too_long).await.is_err());
    }

    #[tokio::test]
    async fn of_all_desktops_the_latest_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&dir.path().join("db")).await.unwrap();
        let (first, second) = (session(&store).await, session(&store).await);
        let last = u32::try_from(DESKTOPS).unwrap() + 1;
        for number in 1..=last {
            let session = if number < 4 { first } else { second };
            store.keep(&kept(session, number, "x")).await.unwrap();
        }
        let left = store.kept(Whose::Session(first)).await.unwrap();
        let numbers: Vec<u32> = left.iter().map(|k| k.desktop.number()).collect();
        assert_eq!(numbers, [2, 3]);
    }

    #[test]
    fn whose_words_is_said_by_a_name_or_an_id() {
        let id = SessionId::new();
        assert_eq!(id.to_string().parse(), Ok(Whose::Session(id)));
        let desktop = DesktopName::from_number(31).unwrap();
        assert_eq!("desktop-000001f".parse(), Ok(Whose::Desktop(desktop)));
        assert!("desktop-1".parse::<Whose>().is_err());
    }
}
