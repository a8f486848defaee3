// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"
	"maps"
	"slices"

	"github.com/labfile/lab/internal/lab"
)

// bake returns the steps that are to be baked, in the user's words.
func (img Image) bake() []string {
	var texts []string
	first := max(0, len(img.Layers)-img.Missing)
	for i, l := range img.Layers[first:] {
		texts = append(texts, fmt.Sprintf("step %d of %d: %s", first+i+1, len(img.Layers), l.Text))
	}
	return texts
}

// box returns the digest of the box that the generation was born from. Records that
// do not name it are older than provision steps, so that the image was the box.
func (r Recorded) box() string {
	if r.Box == "" {
		return r.Image
	}
	return r.Box
}

// provision says how the steps of an image differ. What merely follows from another
// parent is no difference.
func provision(have, want []lab.Layer) []string { return steps("provision", have, want) }

// boot says how the steps differ that a generation runs at its first boot. How long they
// may take does not matter once they have run.
func boot(have, want []lab.BootStep) []string {
	return steps("boot", bootLayers(have), bootLayers(want))
}

func bootLayers(steps []lab.BootStep) []lab.Layer {
	var layers []lab.Layer
	for _, b := range steps {
		l := lab.Layer{Step: b.Step, Text: b.String()}
		if b.File != "" {
			l.Files = map[string]string{b.Script: b.File}
		}
		layers = append(layers, l)
	}
	return layers
}

// sameTimeouts reports whether steps may take the same time.
func sameTimeouts(have, want []lab.BootStep) bool {
	return slices.EqualFunc(have, want, func(a, b lab.BootStep) bool { return a.Timeout == b.Timeout })
}

// steps says how the steps of a key differ.
func steps(key string, have, want []lab.Layer) []string {
	first := 0
	for first < min(len(have), len(want)) && same(have[first], want[first]) {
		first++
	}
	have, want = have[first:], want[first:]
	for len(have) > 0 && len(want) > 0 && same(have[len(have)-1], want[len(want)-1]) {
		have, want = have[:len(have)-1], want[:len(want)-1]
	}
	var why []string
	for i := range max(len(have), len(want)) {
		step := fmt.Sprintf("%s changed: step %d", key, first+i+1)
		switch {
		case i >= len(have):
			why = append(why, fmt.Sprintf("%s added: %s", step, want[i].Text))
		case i >= len(want):
			why = append(why, fmt.Sprintf("%s removed: %s", step, have[i].Text))
		case have[i].Step == want[i].Step:
			for _, f := range files(have[i].Files, want[i].Files) {
				why = append(why, step+": "+f)
			}
		case have[i].Text == want[i].Text:
			why = append(why, fmt.Sprintf("%s: %s", step, want[i].Text))
		default:
			why = append(why, fmt.Sprintf("%s: %s -> %s", step, have[i].Text, want[i].Text))
		}
	}
	return why
}

func same(a, b lab.Layer) bool { return a.Step == b.Step && maps.Equal(a.Files, b.Files) }

// maxFiles is how many files of a step are named.
const maxFiles = 5

// files says which files of a step differ.
func files(have, want map[string]string) []string {
	var differ []string
	for path, digest := range want {
		switch before, ok := have[path]; {
		case !ok:
			differ = append(differ, "file "+path+" added")
		case before != digest:
			differ = append(differ, "file "+path)
		}
	}
	for path := range have {
		if _, ok := want[path]; !ok {
			differ = append(differ, "file "+path+" removed")
		}
	}
	slices.Sort(differ)
	if more := len(differ) - maxFiles; more > 1 {
		differ = append(differ[:maxFiles], fmt.Sprintf("%d more files", more))
	}
	return differ
}
