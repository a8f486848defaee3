// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/lab"
)

func layer(step, text string, files ...string) lab.Layer {
	l := lab.Layer{Key: "sha256:" + step, Step: "sha256:" + step, Text: text}
	for i := 0; i < len(files); i += 2 {
		if l.Files == nil {
			l.Files = map[string]string{}
		}
		l.Files[files[i]] = files[i+1]
	}
	return l
}

func TestProvisionChanges(t *testing.T) {
	apt, web, run := layer("1", "shell apt"), layer("2", "file web/ -> /srv", "web/a", "x", "web/b", "y"), layer("3", "shell run")
	var many []string
	for i := range 9 {
		many = append(many, fmt.Sprintf("web/%d", i), "z")
	}
	for _, tt := range []struct {
		name       string
		have, want []lab.Layer
		why        []string
	}{
		{"same", []lab.Layer{apt, web}, []lab.Layer{apt, web}, nil},
		{"first ones", nil, []lab.Layer{apt}, []string{"provision changed: step 1 added: shell apt"}},
		{"appended", []lab.Layer{apt}, []lab.Layer{apt, run}, []string{"provision changed: step 2 added: shell run"}},
		{"inserted", []lab.Layer{apt, run}, []lab.Layer{apt, web, run}, []string{"provision changed: step 2 added: file web/ -> /srv"}},
		{"removed", []lab.Layer{apt, web, run}, []lab.Layer{apt, run}, []string{"provision changed: step 2 removed: file web/ -> /srv"}},
		{"another", []lab.Layer{apt, run}, []lab.Layer{layer("9", "shell apk"), run}, []string{"provision changed: step 1: shell apt -> shell apk"}},
		{"an option", []lab.Layer{web}, []lab.Layer{layer("8", web.Text, "web/a", "x", "web/b", "y")}, []string{"provision changed: step 1: file web/ -> /srv"}},
		{
			"files",
			[]lab.Layer{apt, web},
			[]lab.Layer{apt, layer("2", web.Text, "web/a", "new", "web/c", "z")},
			[]string{"provision changed: step 2: file web/a", "provision changed: step 2: file web/b removed", "provision changed: step 2: file web/c added"},
		},
		{
			"many files",
			[]lab.Layer{layer("2", web.Text)},
			[]lab.Layer{layer("2", web.Text, many...)},
			[]string{
				"provision changed: step 1: file web/0 added", "provision changed: step 1: file web/1 added", "provision changed: step 1: file web/2 added",
				"provision changed: step 1: file web/3 added", "provision changed: step 1: file web/4 added", "provision changed: step 1: 4 more files",
			},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.why, provision(tt.have, tt.want)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestImageChanges(t *testing.T) {
	apt, run := layer("1", "shell apt"), layer("3", "shell run")
	db := machine("db")
	box := Image{Digest: "sha256:aaa", Box: "sha256:aaa"}
	baked := Image{Digest: run.Key, Box: "sha256:aaa", Layers: []lab.Layer{apt, run}, Missing: 1}
	old := lived(db, 1) // as recorded before there were provision steps
	made := Recorded{Spec: db, Generation: 1, Phase: PhaseLived, Image: run.Key, Box: "sha256:aaa", Layers: baked.Layers}
	for _, tt := range []struct {
		name  string
		have  Recorded
		image Image
		why   []string
		bake  []string
	}{
		{"an old record", old, box, nil, nil},
		{"no image asked for", old, Image{}, nil, nil},
		{"as baked", made, baked, nil, nil},
		{
			"provisioned now", old, baked,
			[]string{"provision changed: step 1 added: shell apt", "provision changed: step 2 added: shell run"},
			[]string{"step 2 of 2: shell run"},
		},
		{
			"box moved", made,
			Image{Digest: "sha256:new", Box: "sha256:bbb", Layers: baked.Layers, Missing: 2},
			[]string{"box base is pinned to another digest: sha256:aaa -> sha256:bbb"},
			[]string{"step 1 of 2: shell apt", "step 2 of 2: shell run"},
		},
		{
			"baked another way", made,
			Image{Digest: "sha256:new", Box: "sha256:aaa", Layers: baked.Layers},
			[]string{"image changed: sha256:3 -> sha256:new"},
			nil,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := Make(Input{
				Want: want(db), Recorded: map[lab.Name]Recorded{"db": tt.have},
				Observed: map[lab.Name][]Observed{"db": {{Number: 1, State: Running}}}, Images: map[lab.Name]Image{"db": tt.image},
			})
			if diff := cmp.Diff(tt.why, p.Steps[0].Reasons); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(tt.bake, p.Steps[0].Bake); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestBootChanges(t *testing.T) {
	step := func(shell, script, file string) lab.BootStep {
		b := lab.BootStep{Provision: lab.Provision{Kind: lab.ProvisionShell, Shell: shell, Script: script}, Step: shell + script, File: file}
		b.Timeout = time.Minute
		return b
	}
	join, link := step("", "./join.sh", "sha256:1"), step("link up", "", "")
	slow := join
	slow.Timeout = time.Hour
	for _, tt := range []struct {
		name       string
		have, want []lab.BootStep
		why        []string
		changes    []string
	}{
		{"none", nil, nil, nil, nil},
		{"same", []lab.BootStep{join, link}, []lab.BootStep{join, link}, nil, nil},
		{"first one", nil, []lab.BootStep{link}, []string{"boot changed: step 1 added: shell link up"}, []string{"timeouts of boot steps changed"}},
		{"script", []lab.BootStep{link, join}, []lab.BootStep{link, step("", "./join.sh", "sha256:2")}, []string{"boot changed: step 2: file ./join.sh"}, nil},
		{"order", []lab.BootStep{join, link}, []lab.BootStep{link, join}, []string{
			"boot changed: step 1: shell ./join.sh -> shell link up", "boot changed: step 2: shell link up -> shell ./join.sh",
		}, nil},
		{"timeout", []lab.BootStep{join, link}, []lab.BootStep{slow, link}, nil, []string{"timeouts of boot steps changed"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			have, want := lab.Machine{Boot: tt.have}, lab.Machine{Boot: tt.want}
			if diff := cmp.Diff(tt.why, differences(Recorded{Spec: have}, want, Image{})); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(tt.changes, inPlace(have, want)); diff != "" {
				t.Error(diff)
			}
		})
	}
}
