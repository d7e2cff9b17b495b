package change

import "testing"

func TestGlobsAreTranslatedAsPythonDoes(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		glob, name string
		want       bool
	}{
		{"[]a]", "]", true}, {"[!]a]", "b", true}, {"[!]a]", "]", false},
		{"[a-]", "-", true}, {"[-a]", "-", true}, {"[z-a]x", "ax", false}, {"[!z-a]x", "ax", true},
		{"[a--]x", "ax", false}, {"[^a]", "^", true}, {"[^a]", "b", false}, {"[\\]", "\\", true},
		{"a\nb*", "a\nb\nc", true}, {"a.b", "axb", false}, {"?", "ü", true}, {"[a-c-e]", "-", true}, {"[a-c-e]", "d", false},
		{"[[]", "[", true}, {"x$", "x\n", false}, {"{a,b}", "a", false},
	} {
		if got := fnmatch(test.glob).MatchString(test.name); got != test.want {
			t.Errorf("%q for %q: %t, want %t", test.name, test.glob, got, test.want)
		}
	}
}

func FuzzGlobsCompile(f *testing.F) {
	f.Add("a[b-c]*[!]x]?[")
	f.Fuzz(func(t *testing.T, glob string) {
		if len(glob) < 200 && fnmatch(glob) == nil {
			t.Errorf("%q does not compile", glob)
		}
	})
}
