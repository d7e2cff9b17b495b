package bench

import (
	"fmt"
	"html"
	"strings"
)

// Sizes of the plot in pixels.
const (
	plotWidth  = 900
	plotLeft   = 300 // where bars begin
	plotScale  = 400 // the length of the floor's bar
	barHeight  = 15
	groupSpace = 14
)

var colours = map[string]string{floor: "#9aa5b1", ours: "#1f6f8b", celery: "#c97b2b"}

// plot draws a bar for each contender and measure. The floor's bar has a fixed
// length, and the others are relative to it: twice as long is twice as good, also
// where less is better. Measures of one contender only are left out. A thin line
// goes from the worst to the best round.
func (r *Report) plot() string {
	var b strings.Builder
	y := 56
	for _, o := range r.Results {
		base := o.Names[0]
		if len(o.Names) == 1 || o.Measure.Growth || o.Contenders[base].Median == 0 {
			continue // nothing to compare with
		}
		reference := o.Contenders[base].Median
		names := strings.Split(wrap(o.Title, 34), "\n")
		for i, line := range names {
			fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end" font-weight="600">%s</text>`+"\n", plotLeft-70, y+12+i*15, html.EscapeString(line))
		}
		for _, name := range o.Names {
			p := o.Contenders[name]
			relative := func(v float64) float64 {
				if o.Measure.Lower {
					return plotScale * reference / v
				}
				return plotScale * v / reference
			}
			length, least, most := relative(p.Median), relative(p.Min), relative(p.Max)
			label := fmt.Sprintf("%s %s", format(p.Median), o.Measure.Unit)
			if name != base {
				label += fmt.Sprintf(" · %.0f %%", 100*length/plotScale)
			}
			fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end" fill="#555">%s</text>`+"\n", plotLeft-8, y+12, shown(name))
			fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/>`+"\n", plotLeft, y, clip(length), barHeight-3, colours[name])
			fmt.Fprintf(&b, `<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="#222" stroke-width="1.5"/>`+"\n",
				plotLeft+clip(least), y+(barHeight-3)/2, plotLeft+clip(most), y+(barHeight-3)/2)
			fmt.Fprintf(&b, `<text x="%.1f" y="%d" fill="#222">%s</text>`+"\n", plotLeft+max(clip(length), clip(least), clip(most))+6, y+11, html.EscapeString(label))
			y += barHeight
		}
		y += groupSpace + max(0, len(names)-len(o.Names))*barHeight
	}
	head := fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">
<rect width="100%%" height="100%%" fill="#fff"/>
<text x="16" y="24" font-size="16" font-weight="600">Each contender relative to the floor: a longer bar is better</text>
<text x="16" y="42" fill="#555">%s, %d rounds; median, and a line from the least to the greatest round</text>
<line x1="%d" y1="50" x2="%d" y2="%d" stroke="#ccc" stroke-dasharray="3 3"/>
`, plotWidth, y+10, plotWidth, y+10, r.Began.Format("2006-01-02"), r.Rounds, plotLeft+plotScale, plotLeft+plotScale, y)
	return head + b.String() + "</svg>\n"
}

// clip keeps a bar and its label inside of the plot.
func clip(length float64) float64 { return min(length, plotWidth-plotLeft-170) }

func shown(name string) string {
	if name == celery {
		return "Celery"
	}
	return name
}

// wrap breaks a text at a space so that no line is longer than width.
func wrap(text string, width int) string {
	var b strings.Builder
	column := 0
	for i, word := range strings.Fields(text) {
		switch {
		case i == 0:
		case column+1+len(word) > width:
			b.WriteByte('\n')
			column = 0
		default:
			b.WriteByte(' ')
			column++
		}
		b.WriteString(word)
		column += len(word)
	}
	return b.String()
}
