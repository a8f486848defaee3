// SPDX-License-Identifier: Apache-2.0

package verify

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/labfile/lab/internal/lab"
)

func plain(v string) lab.Matcher { return lab.Matcher{Op: lab.MatchIs, Value: v} }

func op(o lab.MatchOp, v string) lab.Matcher { return lab.Matcher{Op: o, Value: v} }

func of(o lab.MatchOp, items ...lab.Matcher) lab.Matcher { return lab.Matcher{Op: o, Items: items} }

func TestMatch(t *testing.T) {
	text := func(s string) Fact { return Fact{Text: s} }
	lines := Fact{Text: "one\ntwo bar\n!three\n", Lines: true}
	items := Fact{Items: []string{"foo", "bar", "moo"}, List: true}
	for _, c := range []struct {
		name string
		fact Fact
		m    lab.Matcher
		want bool
	}{
		{"text", text("a"), plain("a"), true},
		{"other text", text("a"), plain("b"), false},
		{"the last newline", text("a\n"), plain("a"), true},
		{"to the letter", text("a\n"), op(lab.MatchEqual, "a"), false},
		{"a number by its value", Fact{Text: "0644", Number: true}, plain("644"), true},
		{"a version is no number", text("1.10"), plain("1.1"), false},
		{"no number", Fact{Text: "12", Number: true}, plain("twelve"), false},
		{"prefix", text("abc"), op(lab.MatchPrefix, "ab"), true},
		{"suffix before the newline", text("abc\n"), op(lab.MatchSuffix, "bc"), true},
		{"substring", text("abc"), op(lab.MatchSubstring, "x"), false},
		{"regexp", text("abc"), op(lab.MatchRegexp, "^a.c$"), true},
		{"greater", text("3"), op(lab.MatchGreater, "3"), false},
		{"greater or equal", text("3\n"), op(lab.MatchGreaterOrEqual, "3.0"), true},
		{"less", text("2.5"), op(lab.MatchLess, "3"), true},
		{"less, no number", text("two"), op(lab.MatchLess, "3"), false},
		{"length of a list", items, op(lab.MatchLen, "3"), true},
		{"length of text", text("äb\n"), op(lab.MatchLen, "2"), true},
		{"not", text("a"), of(lab.MatchNot, plain("b")), true},
		{"and", text("ab"), of(lab.MatchAnd, op(lab.MatchPrefix, "a"), op(lab.MatchSuffix, "a")), false},
		{"or", text("ab"), of(lab.MatchOr, op(lab.MatchPrefix, "x"), op(lab.MatchSuffix, "b")), true},
		{"an element", items, plain("bar"), true},
		{"elements", items, of(lab.MatchContainElements, plain("moo"), plain("foo")), true},
		{"one element twice", items, of(lab.MatchContainElements, plain("foo"), plain("foo")), false},
		{"consist of, needing another order", items, of(lab.MatchConsistOf, op(lab.MatchSuffix, "oo"), plain("foo"), plain("bar")), true},
		{"consist of fewer", items, of(lab.MatchConsistOf, plain("foo")), false},
		{"equal list", items, of(lab.MatchEqualList, plain("foo"), plain("bar"), plain("moo")), true},
		{"equal list, order", items, of(lab.MatchEqualList, plain("bar"), plain("foo"), plain("moo")), false},
		{"patterns", lines, of(lab.MatchContainsPatterns, plain("bar"), plain("/^t.o/"), plain("!four"), plain(`\!three`)), true},
		{"pattern that none may have", lines, of(lab.MatchContainsPatterns, plain("!/^one$/")), false},
		{"pattern across lines", lines, of(lab.MatchContainsPatterns, plain("/one.two/")), false},
		{"no patterns", lines, of(lab.MatchContainsPatterns), true},
		{"what is not there", Fact{None: true}, of(lab.MatchNot, plain("a")), false},
	} {
		got, err := Match(c.fact, c.m)
		if err != nil || got != c.want {
			t.Errorf("%s: %s against %s is %v, %v; want %v", c.name, c.fact, c.m, got, err, c.want)
		}
	}
	for _, m := range []lab.Matcher{
		op(lab.MatchRegexp, "("), op(lab.MatchGreater, "many"), op(lab.MatchLen, "x"), op("be-nice", ""),
		of(lab.MatchNot), of(lab.MatchContainsPatterns, plain("/(/")),
	} {
		if _, err := Match(lines, m); err == nil {
			t.Errorf("%s is taken for a condition", m)
		}
	}
}

// A guest decides how much there is to compare.
func TestMatchIsQuickWhateverTheGuestSays(t *testing.T) {
	var words strings.Builder
	for i := 0; words.Len() < maxOutput; i++ {
		fmt.Fprintf(&words, "w%x\n", i)
	}
	m := lab.Matcher{Op: lab.MatchContainElements}
	for range 100 {
		m.Items = append(m.Items, lab.Matcher{Op: lab.MatchPrefix, Value: "w"})
	}
	began := time.Now()
	for _, f := range []Fact{list(strings.Fields(words.String())), {Text: words.String(), Lines: true}} {
		if ok, err := Match(f, m); !ok || err != nil {
			t.Errorf("got %v, %v", ok, err)
		}
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("it took %s", took)
	}
}

func TestFacts(t *testing.T) {
	const tcp = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1538 00000000:0000 0A 00000000:00000000 00:00000000 00000000   105        0 14045 1
   1: 0100007F:1F90 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 14046 1
  sl  local_address                         remote_address                        st tx_queue
   0: 00000000000000000000000001000000:1538 00000000000000000000000000000000:0000 0A 00000000:00000000 0 0 0 1
`
	for _, c := range []struct {
		name, subject, out string
		parse              func(string, string) (Facts, error)
		want               map[string]string
	}{
		{"port", "tcp:5432", tcp, parsePort, map[string]string{"listening": `"true"`, "ip": `["127.0.0.1", "::1"]`}},
		{"port that is only connected", "tcp:8080", tcp, parsePort, map[string]string{"listening": `"false"`, "ip": "[]"}},
		{
			"file", "", "stat 81a4 1234 root 0 UNKNOWN 1007\n", func(_, out string) (Facts, error) { return parseFile(out) },
			map[string]string{"exists": `"true"`, "mode": `"0644"`, "size": `"1234"`, "owner": `"root"`, "group": `"1007"`, "filetype": `"file"`, "linked-to": "nothing"},
		},
		{
			"link", "", "stat a1ff 7 root 0 root 0\nlink /etc/x y\n", func(_, out string) (Facts, error) { return parseFile(out) },
			map[string]string{"filetype": `"symlink"`, "linked-to": `"/etc/x y"`},
		},
		{
			"no file", "", "absent\n", func(_, out string) (Facts, error) { return parseFile(out) },
			map[string]string{"exists": `"false"`, "mode": "nothing"},
		},
		{"process", "systemd-networkd", "init\nsystemd-network\nsh\nsh\n", parseProcess, map[string]string{"running": `"true"`, "count": `"1"`}},
		{
			"user", "lab", "lab:x:1000:1000:,,,:/home/lab:/bin/sh\nlab sudo\n", parseUser,
			map[string]string{"exists": `"true"`, "uid": `"1000"`, "home": `"/home/lab"`, "shell": `"/bin/sh"`, "groups": `["lab", "sudo"]`},
		},
		{"getent", "db", "10.64.0.10     STREAM db.lab.internal\n10.64.0.10     DGRAM  \n", parseDNS, map[string]string{"resolvable": `"true"`, "addrs": `["10.64.0.10"]`}},
		{
			"nslookup", "db", "nslookup\nServer:\t\t10.64.0.1\nAddress:\t10.64.0.1:53\n\nName:\tdb.lab.internal\nAddress: 10.64.0.10\n", parseDNS,
			map[string]string{"resolvable": `"true"`, "addrs": `["10.64.0.10"]`},
		},
		{"nslookup of nothing", "x", "nslookup\nServer:\t\t10.64.0.1\nAddress:\t10.64.0.1\n", parseDNS, map[string]string{"resolvable": `"false"`}},
		{"package", "sed", "4.9-1\n", parsePackage, map[string]string{"installed": `"true"`, "versions": `["4.9-1"]`}},
		{"service", "ssh", "running\n", parseService, map[string]string{"enabled": `"false"`, "running": `"true"`}},
	} {
		facts, err := c.parse(c.subject, c.out)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		for a, want := range c.want {
			if got := facts[a].String(); got != want {
				t.Errorf("%s: %s is %s, want %s", c.name, a, got, want)
			}
		}
	}
}
