package store

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/internal/database"
)

// maxMessage bounds spec_workflow_task_states.message, in bytes. The column has no
// limit. Python stores a command's whole output there (docs/moonmind.md#c10), and
// the API sends it whenever a client reads the run.
const maxMessage = 32 << 10

// clean makes text valid for a column of type text.
func clean(text string) string { return database.Clean(text) }

// cut cleans text and keeps at most its first characters, as counted by varchar(n).
func cut(text string, characters int) string { return database.Cut(text, characters) }

// headOf cuts a long message, and adds how long it was.
func headOf(message string) string {
	message = clean(message)
	if len(message) <= maxMessage {
		return message
	}
	head := strings.ToValidUTF8(message[:maxMessage], "")
	return fmt.Sprintf("%s… (cut here; %d bytes in all, see the log artifact)", head, len(message))
}

// cleanJSON makes JSON text valid for a column of type jsonb: valid UTF-8, without
// escaped NUL, which JSON allows and jsonb refuses. It returns an error for text
// that is not JSON.
func cleanJSON(text json.RawMessage) (json.RawMessage, error) {
	text = bytes.ToValidUTF8(text, []byte("�"))
	if !json.Valid(text) {
		return nil, failure(ErrInvalid, "payload is not JSON")
	}
	if !bytes.Contains(text, []byte(`\u`)) {
		return text, nil
	}
	// Only string literals contain backslashes, so the scan need not know where it
	// is. An escaped backslash is skipped as a pair. Single surrogates, which jsonb
	// refuses too, become U+FFFD.
	out := make([]byte, 0, len(text))
	for i := 0; i < len(text); {
		switch {
		case text[i] != '\\':
			out = append(out, text[i])
			i++
		case text[i+1] != 'u':
			out = append(out, text[i], text[i+1])
			i += 2
		default:
			unit := hexUnit(text[i+2:])
			switch {
			case unit == 0:
				i += 6
			case unit >= 0xD800 && unit < 0xDC00 && isLowSurrogate(text[i+6:]):
				out = append(out, text[i:i+12]...)
				i += 12
			case unit >= 0xD800 && unit < 0xE000:
				out = append(out, `\ufffd`...)
				i += 6
			default:
				out = append(out, text[i:i+6]...)
				i += 6
			}
		}
	}
	return out, nil
}

func isLowSurrogate(text []byte) bool {
	if len(text) < 6 || text[0] != '\\' || text[1] != 'u' {
		return false
	}
	unit := hexUnit(text[2:])
	return unit >= 0xDC00 && unit < 0xE000
}

func hexUnit(text []byte) int {
	var unit [2]byte
	if _, err := hex.Decode(unit[:], text[:4]); err != nil {
		return -1
	}
	return int(unit[0])<<8 | int(unit[1])
}
