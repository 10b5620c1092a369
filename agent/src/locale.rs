//! The person's language, time zone and keyboard, as the image's files want them. Pure.
//!
//! What the image does not have is not an error: a desktop in another language is better than none.

/// The locale of `locale -a` that speaks a BCP 47 tag best, with its `LANGUAGE` list; `None` if none does.
///
/// The exact region wins, then the language's home region (`fr_FR` for `fr-CA`), then any other.
pub(crate) fn choose(tag: &str, installed: &str) -> Option<(String, String)> {
    let mut parts = tag.split(['-', '_']);
    let language = parts.next()?.to_ascii_lowercase();
    let region = parts
        .find(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_alphabetic()))
        .map(str::to_ascii_uppercase);
    let of_language: Vec<&str> = installed
        .lines()
        .filter_map(|line| {
            let (name, charset) = line.trim().split_once('.')?;
            let utf8 = charset.eq_ignore_ascii_case("utf8") || charset == "UTF-8";
            (utf8 && name.split('_').next() == Some(&language)).then_some(name)
        })
        .collect();
    let find = |wanted: &str| of_language.iter().copied().find(|name| *name == wanted);
    let name = region
        .as_ref()
        .and_then(|region| find(&format!("{language}_{region}")))
        .or_else(|| find(&format!("{language}_{}", language.to_ascii_uppercase())))
        .or_else(|| (language == "en").then(|| find("en_US")).flatten())
        .or_else(|| of_language.first().copied())?;
    let languages = match &region {
        Some(region) => format!("{language}_{region}:{language}"),
        None => language.clone(),
    };
    Some((format!("{name}.UTF-8"), languages))
}

/// Whether an IANA name can be a path below `/usr/share/zoneinfo`.
pub(crate) fn is_time_zone(name: &str) -> bool {
    !name.is_empty()
        && name.len() < 64
        && name.split('/').all(|part| {
            part.starts_with(|c: char| c.is_ascii_alphanumeric())
                && part
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "_+-".contains(c))
        })
}

/// `/etc/default/keyboard` with another layout, such as `fr` or `ca(multix)`; `None` if that is not a layout's name.
pub(crate) fn keyboard(file: &str, layout: &str) -> Option<String> {
    let (name, variant) = match layout.split_once('(') {
        Some((name, variant)) => (name, variant.strip_suffix(')')?),
        None => (layout, ""),
    };
    let plain = |text: &str| {
        text.len() < 32
            && text
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "_-".contains(c))
    };
    if name.is_empty() || !plain(name) || !plain(variant) {
        return None;
    }
    let kept = file
        .lines()
        .filter(|line| !line.starts_with("XKBLAYOUT=") && !line.starts_with("XKBVARIANT="));
    let ours = [
        format!("XKBLAYOUT=\"{name}\""),
        format!("XKBVARIANT=\"{variant}\""),
    ];
    Some(
        kept.map(str::to_owned)
            .chain(ours)
            .map(|line| line + "\n")
            .collect(),
    )
}

/// `/etc/hosts` with this machine's name at 127.0.1.1 (Debian's custom, so that it resolves without a network).
pub(crate) fn hosts(file: &str, host_name: &str) -> String {
    let kept = file
        .lines()
        .filter(|line| line.split_whitespace().next() != Some("127.0.1.1"));
    kept.map(str::to_owned)
        .chain([format!("127.0.1.1\t{host_name}")])
        .map(|line| line + "\n")
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const INSTALLED: &str =
        "C\nC.utf8\nPOSIX\nde_AT.utf8\nen_GB.utf8\nen_US.utf8\nfr_BE.utf8\nfr_FR\nfr_FR.utf8\n";

    #[test]
    fn the_nearest_locale_of_the_language_is_taken() {
        for (tag, locale, languages) in [
            ("fr-FR", "fr_FR.UTF-8", "fr_FR:fr"),
            ("fr-BE", "fr_BE.UTF-8", "fr_BE:fr"),
            ("fr-CA", "fr_FR.UTF-8", "fr_CA:fr"),
            ("fr", "fr_FR.UTF-8", "fr"),
            ("en-AU", "en_US.UTF-8", "en_AU:en"),
            ("de-DE", "de_AT.UTF-8", "de_DE:de"),
            ("fr-Latn-BE", "fr_BE.UTF-8", "fr_BE:fr"),
        ] {
            let chosen = choose(tag, INSTALLED);
            assert_eq!(chosen, Some((locale.into(), languages.into())), "{tag}");
        }
        for tag in ["pt-BR", "", "c", "../etc", "f"] {
            assert_eq!(choose(tag, INSTALLED), None, "{tag}");
        }
    }

    #[test]
    fn a_time_zone_cannot_leave_its_folder() {
        for good in ["Europe/Paris", "UTC", "Etc/GMT+5", "America/Port-au-Prince"] {
            assert!(is_time_zone(good), "{good}");
        }
        for bad in ["", "..", "../shadow", "Europe/../x", "/etc", "a b", "a//b"] {
            assert!(!is_time_zone(bad), "{bad}");
        }
    }

    #[test]
    fn the_keyboard_file_keeps_what_is_not_the_layout() {
        let file = "# comment\nXKBMODEL=\"pc105\"\nXKBLAYOUT=\"us\"\nXKBVARIANT=\"intl\"\n";
        assert_eq!(
            keyboard(file, "ca(multix)").unwrap(),
            "# comment\nXKBMODEL=\"pc105\"\nXKBLAYOUT=\"ca\"\nXKBVARIANT=\"multix\"\n"
        );
        assert!(
            keyboard(file, "fr")
                .unwrap()
                .ends_with("XKBLAYOUT=\"fr\"\nXKBVARIANT=\"\"\n")
        );
        for bad in ["", "fr\"", "fr(", "$(id)", "fr\nX=1"] {
            assert_eq!(keyboard(file, bad), None, "{bad}");
        }
    }

    #[test]
    fn the_hosts_file_names_this_machine_once() {
        let once = hosts("127.0.0.1 localhost\n127.0.1.1 old\n", "desktop-0000001");
        assert_eq!(once, "127.0.0.1 localhost\n127.0.1.1\tdesktop-0000001\n");
        assert_eq!(hosts(&once, "desktop-0000001"), once);
    }
}
