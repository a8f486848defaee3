// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"encoding/json"
	"reflect"
	"testing"
	"time"

	"github.com/labfile/lab/internal/lab"
)

func TestSpecKeepsChecks(t *testing.T) {
	m := lab.Machine{Name: "web", Role: "web", Box: "base", Tests: []lab.Test{{
		Kind: lab.TestRun, Subject: "cat /etc/motd", Hint: "write one", Timeout: 10 * time.Second, Interval: time.Second, Retries: 2,
		Want: []lab.Want{
			{Attribute: "exit-status", Match: lab.Matcher{Op: lab.MatchIs, Value: "0"}},
			{Attribute: "stderr", Match: lab.Matcher{Op: lab.MatchContainsPatterns}},
			{Attribute: "stdout", Match: lab.Matcher{Op: lab.MatchNot, Items: []lab.Matcher{{Op: lab.MatchPrefix, Value: "x"}}}},
		},
	}}}
	data, err := json.Marshal(SpecOf(m))
	if err != nil {
		t.Fatal(err)
	}
	var s Spec
	if err := json.Unmarshal(data, &s); err != nil {
		t.Fatal(err)
	}
	if got := s.Machine("web"); !reflect.DeepEqual(got.Tests, m.Tests) {
		t.Errorf("the ledger gives back %+v, want %+v", got.Tests, m.Tests)
	}
}
