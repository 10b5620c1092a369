//! The catalogue: words in the person's language.

use crate::settings::LANGUAGES;
use crate::view::{Arg, Message};
use fluent_bundle::concurrent::FluentBundle;
use fluent_bundle::{FluentArgs, FluentResource};
use std::fmt;
use std::sync::Arc;
use unic_langid::LanguageIdentifier;

const SOURCES: [(&str, &str); 2] = [
    ("en", include_str!("../locales/en/mayfly.ftl")),
    ("fr", include_str!("../locales/fr/mayfly.ftl")),
];

/// One language. Cheap to clone.
#[derive(Clone)]
pub struct Catalogue {
    language: &'static str,
    bundle: Arc<FluentBundle<FluentResource>>,
}

impl fmt::Debug for Catalogue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Catalogue({})", self.language)
    }
}

impl Catalogue {
    /// The catalogue of this language; English for one that we do not have.
    #[must_use]
    pub fn new(language: &str) -> Self {
        let (language, source) = SOURCES
            .into_iter()
            .find(|(name, _)| *name == language)
            .unwrap_or(SOURCES[0]);
        // The catalogues are tested to be whole; of a broken one, what can be read is used.
        let resource = FluentResource::try_new(source.to_owned()).unwrap_or_else(|(part, _)| part);
        let locale: LanguageIdentifier = language.parse().unwrap_or_default();
        let mut bundle = FluentBundle::new_concurrent(vec![locale]);
        // The isolation marks disturb terminals and menus.
        bundle.set_use_isolating(false);
        bundle.add_resource_overriding(resource);
        Self {
            language,
            bundle: Arc::new(bundle),
        }
    }

    /// The words of a message; its id if the catalogue does not know it.
    #[must_use]
    pub fn text(&self, message: &Message) -> String {
        let Some(pattern) = self
            .bundle
            .get_message(&message.id)
            .and_then(|entry| entry.value())
        else {
            return message.id.clone();
        };
        let args: FluentArgs = message
            .args
            .iter()
            .map(|(name, value)| {
                let value = match value {
                    Arg::Number(number) => (*number).into(),
                    Arg::Text(text) => text.clone().into(),
                };
                (name.clone(), value)
            })
            .collect::<Vec<(String, fluent_bundle::FluentValue<'_>)>>()
            .into_iter()
            .collect();
        let mut errors = Vec::new();
        self.bundle
            .format_pattern(pattern, Some(&args), &mut errors)
            .into_owned()
    }
}

/// The system's language, if we have it, else English: `fr-CA` is `fr`.
#[must_use]
pub fn system_language() -> &'static str {
    let locale = system_locale().and_then(|tag| tag.parse::<LanguageIdentifier>().ok());
    LANGUAGES
        .into_iter()
        .find(|known| locale.as_ref().is_some_and(|l| l.language == *known))
        .unwrap_or("en")
}

/// The system's locale as a BCP 47 tag, such as `fr-CA`; `None` for `C` and what else is no language.
#[must_use]
pub fn system_locale() -> Option<String> {
    let locale: LanguageIdentifier = sys_locale::get_locale()?.parse().ok()?;
    Some(locale.to_string())
}
