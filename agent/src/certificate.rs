//! The RDP server's certificate: a fresh key for every desktop, which clients pin by its fingerprint.

use anyhow::Context as _;
use rcgen::{
    CertificateParams, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose, date_time_ymd,
};
use sha2::{Digest as _, Sha256};

/// A certificate and its key.
pub(crate) struct Certificate {
    /// The certificate, PEM.
    pub(crate) pem: String,
    /// Its key, PEM (PKCS #8).
    pub(crate) key_pem: String,
}

/// Makes one, self-signed, ECDSA P-256, valid from the day before to a month after.
pub(crate) fn make(host_name: &str, today: jiff::civil::Date) -> anyhow::Result<Certificate> {
    let mut params =
        CertificateParams::new(vec![host_name.to_owned()]).context("naming the RDP certificate")?;
    params
        .distinguished_name
        .push(DnType::CommonName, host_name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let day = |days: i32| {
        let day = today.saturating_add(jiff::Span::new().days(days));
        date_time_ymd(
            day.year().into(),
            day.month().unsigned_abs(),
            day.day().unsigned_abs(),
        )
    };
    (params.not_before, params.not_after) = (day(-1), day(31));
    let key = KeyPair::generate().context("making the RDP key")?;
    let certificate = params
        .self_signed(&key)
        .context("signing the RDP certificate")?;
    Ok(Certificate {
        pem: certificate.pem(),
        key_pem: key.serialize_pem(),
    })
}

/// The fingerprint of the first certificate in a PEM text.
pub(crate) fn fingerprint(pem: &str) -> anyhow::Result<String> {
    let base64: String = pem
        .lines()
        .skip_while(|line| *line != "-----BEGIN CERTIFICATE-----")
        .skip(1)
        .take_while(|line| *line != "-----END CERTIFICATE-----")
        .collect();
    let der = data_encoding::BASE64
        .decode(base64.as_bytes())
        .ok()
        .filter(|der| !der.is_empty())
        .context("not a PEM certificate")?;
    Ok(data_encoding::HEXLOWER.encode(&Sha256::digest(der)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_certificate_is_fresh() {
        let today = jiff::civil::date(2026, 1, 1);
        let one = make("desktop-0000001", today).unwrap();
        let two = make("desktop-0000001", today).unwrap();
        assert_ne!(
            fingerprint(&one.pem).unwrap(),
            fingerprint(&two.pem).unwrap()
        );
        assert_ne!(one.key_pem, two.key_pem);
    }

    #[test]
    fn the_fingerprint_is_what_openssl_says() {
        assert_eq!(
            fingerprint(include_str!("testdata/certificate.pem")).unwrap(),
            "ec817391ab28e29eac93ce9fb1ab03dd09bed550ecd19b36f92d7ba4b06f69aa"
        );
        assert!(fingerprint("").is_err());
    }
}
