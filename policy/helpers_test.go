package policy

import (
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/token"
)

// textEntry is a field with a text.
func textEntry(text string) entry {
	node := ast.String(token.String(text, text, &token.Position{Line: 1, Column: 1}))
	return entry{"x", node, node}
}
