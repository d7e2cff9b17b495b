package store

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"encoding/base64"
	"strings"
)

// EncryptApprovalToken returns what the column approval_token holds of a token, as
// MoonMind's API encrypts it with its setting ENCRYPTION_MASTER_KEY
// (docs/moonmind.md#approval): AES-256-CBC with the SHA-256 of the key, whose first
// half is also the IV, padded with stars, in base64. The scheme is MoonMind's, and
// weak: equal tokens look equal. A column that the API cannot decrypt breaks every one
// of its requests that reads the run.
//
// ErrInvalid without a key, and for a token that is empty or ends with a star, which
// the padding would swallow.
func EncryptApprovalToken(masterKey, token string) ([]byte, error) {
	switch {
	case masterKey == "":
		return nil, failure(ErrInvalid, "there is no master key to encrypt the approval's token with")
	case token == "" || strings.HasSuffix(token, "*"):
		return nil, failure(ErrInvalid, "an approval's token must not be empty or end with a star")
	}
	key := sha256.Sum256([]byte(masterKey))
	block, err := aes.NewCipher(key[:])
	if err != nil {
		return nil, err
	}
	padding := aes.BlockSize - len(token)%aes.BlockSize
	text := append([]byte(token), bytes.Repeat([]byte("*"), padding)...)
	cipher.NewCBCEncrypter(block, key[:aes.BlockSize]).CryptBlocks(text, text)
	return base64.StdEncoding.AppendEncode(nil, text), nil
}
