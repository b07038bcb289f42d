"""Object identifiers in the certificates of evidence: key usages, and extensions."""

from __future__ import annotations

from typing import Final

from cryptography.x509 import ObjectIdentifier

EKU_EK: Final = ObjectIdentifier("2.23.133.8.1")  # tcg-kp-EKCertificate
EKU_AK: Final = ObjectIdentifier("2.23.133.8.3")  # tcg-kp-AIKCertificate
OID_VIRTUAL: Final = ObjectIdentifier("2.23.133.6.4")  # virtualPlatformAttestationService
# Extension of a host AK's certificate: OCTET STRING with the Name of the host EK for which the AK's
# credential was activated. The issuer puts it there; without it no EK certificate says anything
# about this AK's TPM. (ITU-T X.667: an arc of our own, from a random UUID.)
OID_ACTIVATED_EK: Final = ObjectIdentifier("2.25.313474860978635988100217944922830782818")
# In an issuing CA's certificate: the Name of the AK of the host it is of, as an OCTET STRING.
OID_HOST_AK: Final = ObjectIdentifier("2.25.52907855989375833159590951243373929653")
