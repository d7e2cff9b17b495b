package change

import (
	"strings"
	"unicode"

	"golang.org/x/text/unicode/norm"
)

// isDotGit says that a name in a folder is .git on some file system: in other
// letters, with characters that the file system ignores, or as its short name.
func isDotGit(name string) bool {
	name = strings.Map(func(r rune) rune {
		if unicode.Is(unicode.Cf, r) {
			return -1 // HFS+ ignores them
		}
		return unicode.ToLower(r)
	}, name)
	name, _, _ = strings.Cut(name, ":") // NTFS: a stream of the file
	name = strings.TrimRight(name, ". ")
	return name == ".git" || name == "git~1"
}

// folded returns the same text for paths that name one file on a file system that
// ignores case or the form of accents.
func folded(path string) string {
	return strings.ToLower(norm.NFC.String(strings.ToUpper(norm.NFC.String(path))))
}
