// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/lab"
)

func TestChanged(t *testing.T) {
	api, db := lab.Exposed{Name: "api", Port: 9000}, lab.Exposed{Name: "db", Port: 5432}
	for _, c := range []struct {
		name string
		have *lab.Lab
		want lab.Lab
		said []string
	}{
		{"a new lab", nil, lab.Lab{Expires: time.Hour, Expose: []lab.Exposed{api}}, nil},
		{"the same", &lab.Lab{Expires: time.Hour, Expose: []lab.Exposed{api}}, lab.Lab{Expires: time.Hour, Expose: []lab.Exposed{api}}, nil},
		{"expires", &lab.Lab{}, lab.Lab{Expires: time.Hour}, []string{"expires changed: never -> 1h0m0s"}},
		{
			"expose", &lab.Lab{Expose: []lab.Exposed{api}},
			lab.Lab{Expose: []lab.Exposed{db}},
			[]string{"db:5432 leads to port 5432 of this host", "api:9000 no longer leads to port 9000 of this host"},
		},
		{"proxy", &lab.Lab{}, lab.Lab{InheritProxy: true}, []string{"guests get the proxy settings of this host"}},
		{"no proxy", &lab.Lab{InheritProxy: true}, lab.Lab{}, []string{"guests no longer get the proxy settings of this host"}},
		{"the same proxy", &lab.Lab{InheritProxy: true}, lab.Lab{InheritProxy: true}, nil},
	} {
		p := Make(Input{Opened: c.have, Want: &c.want})
		if diff := cmp.Diff(c.said, p.Changed); diff != "" || p.Changes() != (c.said != nil) {
			t.Errorf("%s: changes %v (-want +got):\n%s", c.name, p.Changes(), diff)
		}
	}
}
