// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"cmp"
	"fmt"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"gopkg.in/yaml.v3"

	"github.com/labfile/lab/internal/lab"
)

// testEntry is an item of checks. It has one kind, whose value is what it is about,
// and beside it what that must be like. The tag of says which kinds have an
// attribute, fact what its value is: bool, number, mode, text, list or lines.
type testEntry struct {
	place
	On      names   `yaml:"on" also:"machine machines host hosts role roles" doc:"The machines: a name, or a list of names. NAME means every replica of NAME. Without it, every machine of the lab."`
	Run     subject `yaml:"run" guest:"text" also:"command cmd exec shell" doc:"A command line, run by the guest's shell."`
	Port    subject `yaml:"port" also:"tcp udp" doc:"A port that the guest listens on: 80, tcp:80 or udp:53."`
	HTTP    subject `yaml:"http" also:"url get https" doc:"A URL, in full. The machine itself is asked, whatever host stands in it. A redirect is not followed."`
	File    subject `yaml:"file" form:"path" also:"path directory" doc:"An absolute path in the guest, of anything that has one."`
	Package subject `yaml:"package" also:"pkg" doc:"A package of dpkg, apk or rpm."`
	Service subject `yaml:"service" also:"unit" doc:"A service of systemd, OpenRC or a plain init."`
	Process subject `yaml:"process" also:"proc" doc:"A process, by the name of its program."`
	User    subject `yaml:"user" also:"account" doc:"A user of the guest."`
	DNS     subject `yaml:"dns" also:"addr resolve hostname" doc:"A name that the guest looks up."`

	ExitStatus matcher `yaml:"exit-status" of:"run" fact:"number" also:"exit_status exit code exitcode exit-code" doc:"run: exit code. It must be 0 unless this says something else."`
	Stdout     matcher `yaml:"stdout" of:"run" fact:"lines" also:"output out" doc:"run: standard output."`
	Stderr     matcher `yaml:"stderr" of:"run" fact:"lines" also:"err" doc:"run: standard error."`
	Listening  matcher `yaml:"listening" of:"port" fact:"bool" also:"open" doc:"port: somebody listens. Without any condition, true."`
	IP         matcher `yaml:"ip" of:"port" fact:"list" also:"ips address" doc:"port: the addresses that are listened on."`
	Status     matcher `yaml:"status" of:"http" fact:"number" also:"code" doc:"http: status. It must be from 200 to 399 unless this says something else."`
	Body       matcher `yaml:"body" of:"http" fact:"lines" doc:"http: body of the answer."`
	Headers    matcher `yaml:"headers" of:"http" fact:"lines" also:"header" doc:"http: headers of the answer, one per line: Name: value."`
	Exists     matcher `yaml:"exists" of:"file user" fact:"bool" doc:"file, user: there is one. Without any condition, true."`
	Mode       matcher `yaml:"mode" of:"file" fact:"mode" also:"permissions" doc:"file: permissions, in octal."`
	Owner      matcher `yaml:"owner" of:"file" fact:"text" doc:"file: name of the owner, or the number of one that has none."`
	Group      matcher `yaml:"group" of:"file" fact:"text" doc:"file: name of the group, or the number of one that has none."`
	Size       matcher `yaml:"size" of:"file" fact:"number" doc:"file: size in bytes."`
	FileType   matcher `yaml:"filetype" of:"file" fact:"text" also:"type" doc:"file: file, directory, symlink, socket, pipe, block-device or character-device."`
	LinkedTo   matcher `yaml:"linked-to" of:"file" fact:"text" also:"linked_to target link" doc:"file: where the symbolic link leads."`
	Contents   matcher `yaml:"contents" of:"file" fact:"lines" also:"content contains" doc:"file: its content, of which the first MiB is looked at."`
	SHA256     matcher `yaml:"sha256" of:"file" fact:"text" also:"checksum digest" doc:"file: SHA-256 of its content, in hex."`
	Installed  matcher `yaml:"installed" of:"package" fact:"bool" doc:"package: it is installed. Without any condition, true."`
	Versions   matcher `yaml:"versions" of:"package" fact:"list" also:"version" doc:"package: the installed versions."`
	Enabled    matcher `yaml:"enabled" of:"service" fact:"bool" doc:"service: it is started at boot."`
	Running    matcher `yaml:"running" of:"service process" fact:"bool" also:"active" doc:"service, process: it runs. Without any condition, true."`
	Count      matcher `yaml:"count" of:"process" fact:"number" doc:"process: how many there are."`
	UID        matcher `yaml:"uid" of:"user" fact:"number" doc:"user: number."`
	GID        matcher `yaml:"gid" of:"user" fact:"number" doc:"user: number of the main group."`
	Groups     matcher `yaml:"groups" of:"user" fact:"list" doc:"user: names of the groups."`
	Home       matcher `yaml:"home" of:"user" fact:"text" doc:"user: home directory."`
	Shell      matcher `yaml:"shell" of:"user" fact:"text" doc:"user: login shell."`
	Resolvable matcher `yaml:"resolvable" of:"dns" fact:"bool" also:"resolveable" doc:"dns: it has an address. Without any condition, true."`
	Addrs      matcher `yaml:"addrs" of:"dns" fact:"list" also:"addresses" doc:"dns: its addresses."`
	Insecure   boolean `yaml:"insecure" default:"false" also:"allow-insecure" doc:"http: any certificate will do."`

	Name     text     `yaml:"name" also:"title description" doc:"What the check is called. Without it, by its kind and what it is about."`
	Hint     text     `yaml:"hint" also:"help" doc:"What to do if it fails. It is shown then."`
	Skip     skip     `yaml:"skip" default:"false" also:"skipped disabled" doc:"Does not run the check for now: true, or the reason why. It counts as skipped; false runs it."`
	Timeout  duration `yaml:"timeout" range:"100ms..1h" default:"10s" also:"within deadline" doc:"How long one attempt may take."`
	Retries  integer  `yaml:"retries" range:"0..1000" default:"0" also:"retry attempts" doc:"How many more attempts there are if one fails."`
	Interval duration `yaml:"interval" range:"10ms..1h" default:"1s" also:"every period delay" doc:"Pause between two attempts."`
}

func (*testEntry) alternatives() []string {
	return []string{"run", "port", "http", "file", "package", "service", "process", "user", "dns"}
}

// When one attempt at a check is given up, and the pause before the next.
const (
	defaultTestTimeout  = 10 * time.Second
	defaultTestInterval = time.Second
)

// names are a name or a list of names.
type names struct{ list[text] }

func (n *names) decode(d *decoder, node *yaml.Node, at place, tag reflect.StructTag) {
	if node.Kind != yaml.SequenceNode {
		n.items = make([]text, 1)
		d.value(node, at, &n.items[0], tag)
		n.locate(at)
		return
	}
	n.list.decode(d, node, at, tag)
	if len(node.Content) == 0 {
		d.add(at, "names no machine; leave it out for every machine")
	}
}

func (n *names) schema(tag reflect.StructTag) *schema {
	s := n.list.schema(tag)
	return &schema{AnyOf: []*schema{s.Items, s}}
}

// subject is the value of a kind: what the check is about.
type subject struct {
	text  text
	given bool // the key is there, if with a value that was refused
}

func (s *subject) decode(d *decoder, n *yaml.Node, at place, tag reflect.StructTag) {
	s.given = true
	d.value(n, at, &s.text, tag)
}

func (s *subject) schema(tag reflect.StructTag) *schema { return s.text.schema(tag) }

// tests returns what the Labfile checks, by machine, in its order.
func (c *converter) tests() map[lab.Name][]lab.Test {
	out := map[lab.Name][]lab.Test{}
	for i := range c.doc.Checks.items {
		e := &c.doc.Checks.items[i]
		on := c.on(e)
		if t, ok := c.test(e); ok {
			for _, name := range on {
				out[name] = append(out[name], t)
			}
		}
	}
	return out
}

// on returns the machines that a check is for, each once.
func (c *converter) on(e *testEntry) []lab.Name {
	var out []lab.Name
	seen := map[lab.Name]bool{}
	add := func(names []lab.Name) {
		for _, n := range names {
			if !seen[n] {
				seen[n] = true
				out = append(out, n)
			}
		}
	}
	every := func() {
		for _, r := range c.roles {
			add(r.names)
		}
	}
	if !e.On.set() {
		every()
	}
	for _, on := range e.On.items {
		if !on.set() {
			continue
		}
		whole := slices.IndexFunc(c.roles, func(r *role) bool { return r.name() == on.value })
		switch {
		case on.value == "all":
			every()
		case whole >= 0:
			add(c.roles[whole].names)
		case c.names[lab.Name(on.value)] != nil:
			add([]lab.Name{lab.Name(on.value)})
		default:
			c.unknownMachine(on)
		}
	}
	return out
}

// test returns the check that an item stands for; false if there was a problem with
// it, which has been noted.
func (c *converter) test(e *testEntry) (lab.Test, bool) {
	var kinds []string
	var about *subject
	v := reflect.ValueOf(e).Elem()
	for _, f := range fieldsOf(v.Type()) {
		if s, ok := v.FieldByIndex(f.index).Addr().Interface().(*subject); ok && s.given {
			kinds, about = append(kinds, f.name), s
		}
	}
	switch {
	case len(kinds) == 0:
		// An item that is no mapping, or an empty one, has been reported.
		if !reflect.DeepEqual(*e, testEntry{place: e.place}) {
			c.add(e.place, "does not say what to check; add one of %s", strings.Join(e.alternatives(), ", "))
		}
		return lab.Test{}, false
	case len(kinds) > 1:
		c.add(e.place, "is two checks in one: %s and %s; begin each with a dash of its own", kinds[0], kinds[1])
		return lab.Test{}, false
	}
	t := lab.Test{
		Name: e.Name.value, Kind: lab.TestKind(kinds[0]), Hint: e.Hint.value, Skip: e.Skip.value,
		Insecure: e.Insecure.value, Retries: e.Retries.value, Timeout: defaultTestTimeout, Interval: defaultTestInterval,
	}
	if e.Timeout.set() {
		t.Timeout = e.Timeout.value
	}
	if e.Interval.set() {
		t.Interval = e.Interval.value
	}
	if e.Insecure.set() && t.Kind != lab.TestHTTP {
		c.add(e.Insecure.place, "is for http only")
	}
	complete := c.wants(e, &t)
	if !about.text.set() {
		return t, false
	}
	var err error
	if t.Subject, err = testSubject(t.Kind, about.text.value); err != nil {
		c.add(about.text.place, "%v", err)
	}
	return t, complete && err == nil
}

// wants sets what a check must find, in the order of the Labfile, with what goes
// without saying.
func (c *converter) wants(e *testEntry, t *lab.Test) bool {
	type want struct {
		at place
		lab.Want
	}
	var (
		wants []want
		known []string
		ok    = true
		v     = reflect.ValueOf(e).Elem()
		all   = fieldsOf(v.Type())
	)
	for _, f := range all {
		if slices.Contains(strings.Fields(f.tag.Get("of")), string(t.Kind)) {
			known = append(known, f.name)
		}
	}
	for _, f := range all {
		m, is := v.FieldByIndex(f.index).Addr().Interface().(*matcher)
		switch {
		case !is || !m.given:
		case !slices.Contains(known, f.name):
			c.add(m.at, "%s is not for %s, which has %s", f.name, t.Kind, strings.Join(known, ", "))
			ok = false
		case !m.set():
			ok = false
		default:
			wants = append(wants, want{m.place, lab.Want{Attribute: f.name, Match: m.value}})
		}
	}
	slices.SortStableFunc(wants, func(a, b want) int {
		return cmp.Or(cmp.Compare(a.at.line, b.at.line), cmp.Compare(a.at.column, b.at.column))
	})
	for _, w := range wants {
		t.Want = append(t.Want, w.Want)
	}
	standard := standardWant(t.Kind)
	always := t.Kind == lab.TestRun || t.Kind == lab.TestHTTP
	named := slices.ContainsFunc(t.Want, func(w lab.Want) bool { return w.Attribute == standard.Attribute })
	if len(t.Want) == 0 || always && !named {
		t.Want = slices.Insert(t.Want, 0, standard)
	}
	return ok
}

// standardWant is what a check finds out if it names nothing.
func standardWant(kind lab.TestKind) lab.Want {
	is := func(attribute, value string) lab.Want {
		return lab.Want{Attribute: attribute, Match: lab.Matcher{Op: lab.MatchIs, Value: value}}
	}
	switch kind {
	case lab.TestRun:
		return is("exit-status", "0")
	case lab.TestPort:
		return is("listening", "true")
	case lab.TestHTTP:
		return lab.Want{Attribute: "status", Match: lab.Matcher{Op: lab.MatchAnd, Items: []lab.Matcher{
			{Op: lab.MatchGreaterOrEqual, Value: "200"}, {Op: lab.MatchLess, Value: "400"},
		}}}
	case lab.TestPackage:
		return is("installed", "true")
	case lab.TestService, lab.TestProcess:
		return is("running", "true")
	case lab.TestDNS:
		return is("resolvable", "true")
	}
	return is("exists", "true") // file, user
}

// maxSubject is the length of the longest name that can be asked for, in bytes.
const maxSubject = 255

// testSubject returns what a check is about in the form that the check wants.
func testSubject(kind lab.TestKind, s string) (string, error) {
	switch kind {
	case lab.TestRun, lab.TestFile:
		return s, nil
	case lab.TestPort:
		proto, port, both := strings.Cut(s, ":")
		if !both {
			proto, port = "tcp", s
		}
		n, err := strconv.Atoi(port)
		if err != nil || n < 1 || n > 65535 || proto != "tcp" && proto != "udp" {
			return "", fmt.Errorf("%q is not a port; write 80, tcp:80 or udp:53", shorten(s))
		}
		return fmt.Sprintf("%s:%d", proto, n), nil
	case lab.TestHTTP:
		u, err := url.Parse(s)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" {
			return "", fmt.Errorf("%q is not a URL; write it in full, such as http://localhost/healthz", shorten(s))
		}
		if p := u.Port(); p != "" {
			if n, err := strconv.Atoi(p); err != nil || n < 1 || n > 65535 {
				return "", fmt.Errorf("port %s of the URL is not between 1 and 65535", shorten(p))
			}
		}
		if u.User != nil {
			return "", fmt.Errorf("a URL must not hold a user name or password, which would end up in the lab's records")
		}
		return s, nil
	}
	space := func(r rune) bool { return unicode.IsControl(r) || unicode.IsSpace(r) && kind != lab.TestProcess }
	if strings.HasPrefix(s, "-") || len(s) > maxSubject || strings.ContainsFunc(s, space) {
		if kind == lab.TestDNS {
			return "", fmt.Errorf("%q is not a name to look up", shorten(s))
		}
		return "", fmt.Errorf("%q is not the name of a %s", shorten(s), kind)
	}
	return s, nil
}
