package database

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
)

// applyTLS applies the TLS options of libpq that the driver does not know: bounds of
// the version, and lists of revoked certificates. It changes the configurations in
// place, since the driver compares them by pointer.
func applyTLS(connect *pgx.ConnConfig, options map[string]string) error {
	revoked, err := revocations(options["sslcrl"], options["sslcrldir"])
	if err != nil {
		return err
	}
	change := func(config *tls.Config) {
		if config == nil {
			return
		}
		if version := address.TLSVersions[strings.ToLower(options["ssl_min_protocol_version"])]; version != 0 {
			config.MinVersion = version
		}
		config.MaxVersion = address.TLSVersions[strings.ToLower(options["ssl_max_protocol_version"])]
		if revoked != nil {
			hasAuthority := config.RootCAs != nil
			config.VerifyConnection = func(state tls.ConnectionState) error {
				return revoked.check(state.PeerCertificates, hasAuthority, time.Now())
			}
		}
	}
	change(connect.TLSConfig)
	for _, other := range connect.Fallbacks {
		change(other.TLSConfig)
	}
	return nil
}

// revocationLists are the lists that sslcrl and sslcrldir name.
type revocationLists []*x509.RevocationList

// revocations reads the lists of a file and of the files of a directory. It
// returns nil if both are "".
func revocations(file, dir string) (revocationLists, error) {
	var files []string
	if file != "" {
		files = append(files, file)
	}
	if dir != "" {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return nil, fmt.Errorf("option sslcrldir: %w", err)
		}
		for _, entry := range entries {
			files = append(files, filepath.Join(dir, entry.Name()))
		}
	}
	var lists revocationLists
	for _, path := range files {
		content, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("option sslcrl: %w", err)
		}
		found := 0
		for block, rest := pem.Decode(content); block != nil; block, rest = pem.Decode(rest) {
			if block.Type != "X509 CRL" {
				continue
			}
			list, err := x509.ParseRevocationList(block.Bytes)
			if err != nil {
				return nil, fmt.Errorf("option sslcrl: %s: %w", path, err)
			}
			lists = append(lists, list)
			found++
		}
		if found == 0 && path == file {
			return nil, fmt.Errorf("option sslcrl: %s has no list of revoked certificates in PEM form", path)
		}
	}
	if lists == nil && dir != "" {
		return nil, fmt.Errorf("option sslcrldir: %s has no list of revoked certificates in PEM form", dir)
	}
	return lists, nil
}

// check returns an error for a revoked certificate. If the client has a
// certificate authority, it also returns one if no valid list covers the server's
// certificate, as OpenSSL does.
func (l revocationLists) check(chain []*x509.Certificate, hasAuthority bool, now time.Time) error {
	for i, certificate := range chain {
		inForce, expired := false, false
		for _, list := range l {
			if !bytes.Equal(list.RawIssuer, certificate.RawIssuer) {
				continue
			}
			if list.NextUpdate.IsZero() || now.Before(list.NextUpdate) {
				inForce = true
			} else {
				expired = true
			}
			for _, entry := range list.RevokedCertificateEntries {
				if entry.SerialNumber.Cmp(certificate.SerialNumber) == 0 {
					return &revokedError{fmt.Sprintf("its certificate %q is revoked", certificate.Subject.CommonName)}
				}
			}
		}
		switch {
		case inForce || i > 0 || !hasAuthority:
		case expired:
			return &revokedError{"its list of revoked certificates has expired: bring the file of option sslcrl up to date"}
		default:
			return &revokedError{"option sslcrl has no list of its certificate's issuer"}
		}
	}
	return nil
}

// revokedError says why a server's certificate is not trusted.
type revokedError struct{ why string }

func (e *revokedError) Error() string { return "the server is not trusted: " + e.why }
