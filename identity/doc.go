// Package identity says who a node is, and what others may believe about it.
//
// An identity is an Ed25519 key whose identifier does not change when the key
// rotates. It attests the X25519 key of its secure channels, an authority signs
// credentials about it, and a Trust decides which credentials count. Self is
// what this node proves, Peer is what the other end proved; both are live: a
// renewed credential reaches everyone who holds them. Home keeps them on disk,
// and a Ticket carries an invitation to the node that is to join.
//
// # Encoding
//
// Everything signed is deterministic CBOR (RFC 8949, section 4.2.1) and has
// exactly one encoding: decoders refuse what they would not have written
// themselves, which covers indefinite lengths, tags, duplicate or unknown keys,
// longer-than-needed integers, unsorted maps and trailing bytes. Hashes and
// signatures are computed over the bytes as received.
//
// A signature is Ed25519 over a sequence of parts, each preceded by its length
// as four bytes, big endian. The first part is the label "portal/<type>/v1", so
// that a signature made for one type is never one of another. The types used
// here are change, rotation, attestation and (inside COSE) credential.
//
//	history     = [1*16 change]                               ≤ 4 KiB
//	change      = [data: bstr, signature: bstr, old: bstr]
//	data        = [previous: bstr, alg: -8, key: bstr .size 32]
//
// In the first change previous and old are empty. In each later one previous is
// the SHA-256 of the data before it and old is a signature ("rotation") by the
// key before it; signature ("change") is by the key that the change brings. The
// identifier is the SHA-256 of the first data; its text is "P" and base32.
//
//	attestation = [data: bstr, signature: bstr]               ≤ 256 bytes
//	data        = [subject: bstr .size 32, change: bstr .size 32, role: "noise-static",
//	               key: bstr .size 32, not-before: int, expires: int]
//
// Times here are milliseconds since 1970 UTC. The signature ("attestation") is
// by the key of the identity's latest change, whose hash is change.
//
// A credential is an untagged COSE_Sign1 (RFC 9052, section 4.2) of at most
// 4 KiB over CWT claims (RFC 8392). Protected header: {1: -8, 16:
// "application/portal-credential+cwt"}; unprotected: {}; external_aad:
// "portal/credential/v1". Claims:
//
//	     1  iss   text of the authority's identifier
//	     2  sub   text of the subject's identifier
//	     4  exp   seconds, rounded up
//	     5  nbf   seconds, rounded down
//	     7  cti   serial, 16 bytes
//	-65537        hash of the subject's latest change, 32 bytes
//	-65538        attributes: text => text / int / bool / [*text]
//	-65539        expiry in milliseconds
//	-65540        not-before in milliseconds
//
// CWT times are whole seconds, too coarse for short lives; the claims in
// milliseconds decide, and the registered ones must agree with them.
package identity
