// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"maps"
	"net/textproto"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"gopkg.in/yaml.v3"
)

const cloudConfig = "#cloud-config"

// UserDataError says why user data cannot be handed to cloud-init.
type UserDataError struct {
	Line    int    // of the user data, from 1
	Message string // what is wrong there
	YAML    error  // what the YAML parser said, if it is no YAML
}

func (e *UserDataError) Error() string {
	return fmt.Sprintf("user data for cloud-init: line %d: %s", e.Line, e.Message)
}

// CheckUserData returns a *UserDataError if data is not what cloud-init reads: a cloud
// configuration in YAML, a script, or another of its formats, told by its first line.
func CheckUserData(data string) error {
	if len(data) > MaxUserData {
		return &UserDataError{Line: 1, Message: fmt.Sprintf("%d bytes; at most %d are possible", len(data), MaxUserData)}
	}
	if !isCloudConfig(data) {
		_, err := mimeType(data)
		return err
	}
	_, err := readConfig(data)
	return err
}

// isCloudConfig reports whether data is a cloud configuration; so is no data.
func isCloudConfig(data string) bool {
	first, _, _ := strings.Cut(data, "\n")
	return strings.TrimSpace(data) == "" || strings.TrimSpace(first) == cloudConfig
}

var yamlLine = regexp.MustCompile(`^yaml: (?:line ([0-9]+): )?(.*)$`)

// readConfig returns the mapping of a cloud configuration, which may be empty.
func readConfig(data string) (*yaml.Node, error) {
	var doc yaml.Node
	if err := yaml.Unmarshal([]byte(data), &doc); err != nil {
		bad := &UserDataError{Line: 1, Message: err.Error(), YAML: err}
		if m := yamlLine.FindStringSubmatch(err.Error()); m != nil {
			bad.Message = m[2]
			if line, err := strconv.Atoi(m[1]); err == nil {
				bad.Line = max(line, 1)
			}
		}
		return nil, bad
	}
	if len(doc.Content) == 0 || doc.Content[0].Tag == "!!null" {
		return &yaml.Node{Kind: yaml.MappingNode}, nil
	}
	config := doc.Content[0]
	if config.Kind != yaml.MappingNode {
		return nil, &UserDataError{Line: config.Line, Message: "a cloud configuration is a mapping of keys, such as packages: [nginx]"}
	}
	return config, nil
}

// files are the files of the seed.
func (c SeedConfig) files() ([]seedFile, error) {
	if err := CheckUserData(c.UserData); err != nil {
		return nil, err
	}
	meta, err := yaml.Marshal(map[string]any{
		"instance-id":    c.InstanceID,
		"local-hostname": c.Identity.Hostname,
	})
	if err != nil {
		return nil, err
	}
	user, err := c.userData()
	if err != nil {
		return nil, err
	}
	network, err := yaml.Marshal(c.network())
	if err != nil {
		return nil, err
	}
	return []seedFile{{"meta-data", meta}, {"user-data", user}, {"network-config", network}}, nil
}

// network is the network configuration, version 2. The address is fixed all the
// same: the lab's DHCP server knows the hardware address.
func (c SeedConfig) network() map[string]any {
	if c.AgentRuns || c.Identity.MAC == "" {
		return map[string]any{"config": "disabled"}
	}
	return map[string]any{
		"version": 2,
		"ethernets": map[string]any{
			"lab0": map[string]any{
				"match": map[string]any{"macaddress": c.Identity.MAC},
				"dhcp4": true,
			},
		},
	}
}

// ours is what cloud-init must do whatever the user data says.
func (c SeedConfig) ours() (map[string]any, error) {
	if c.AgentRuns {
		return map[string]any{"preserve_hostname": true, "ssh_deletekeys": false, "disable_root": false}, nil
	}
	key, err := ParseKey(c.Identity.HostKey)
	if err != nil {
		return nil, err
	}
	m := map[string]any{
		"hostname":            c.Identity.Hostname,
		"ssh_authorized_keys": anySlice(c.Identity.AuthorizedKeys),
		"ssh_deletekeys":      true, // those of the box are everybody's
		"ssh_keys": map[string]any{
			"ed25519_private": string(key.PEM),
			"ed25519_public":  AuthorizedKey(key.Signer.PublicKey()),
		},
	}
	switch c.User {
	case "":
	case "root":
		m["disable_root"] = false
	default:
		// Renames the box's default user, or is its name already.
		m["user"] = map[string]any{"name": c.User}
	}
	return m, nil
}

func anySlice(s []string) []any {
	out := make([]any, len(s))
	for i, v := range s {
		out[i] = v
	}
	return out
}

// userData merges the user's data with ours: two cloud configurations become one,
// anything else is handed over side by side, ours last, which is what counts. Proxy
// settings are a part of their own, which cloud-init merges with nothing; it comes first,
// so that what the user's parts run has them.
func (c SeedConfig) userData() ([]byte, error) {
	ours, err := c.ours()
	if err != nil {
		return nil, err
	}
	var parts []part
	if len(c.Proxy) > 0 {
		parts = append(parts, part{mime: "text/cloud-boothook", name: "lab-proxy", data: proxyBoothook(c.Proxy)})
	}
	if isCloudConfig(c.UserData) {
		merged, err := mergeConfig(c.UserData, ours)
		if err != nil || len(parts) == 0 {
			return merged, err
		}
		parts = append(parts, part{mime: "text/cloud-config", data: merged})
	} else {
		mime, err := mimeType(c.UserData)
		if err != nil {
			return nil, err
		}
		own, err := config(ours)
		if err != nil {
			return nil, err
		}
		parts = append(parts, part{mime: mime, data: []byte(c.UserData)}, part{mime: "text/cloud-config", data: own})
	}
	// The boundary depends on the content, so that it can't stand in it.
	sum := sha256.Sum256([]byte(c.UserData))
	return multipart(fmt.Sprintf("lab-%x", sum[:12]), parts), nil
}

// part is a part of user data.
type part struct {
	mime string // its type; empty if data begins with headers of its own
	name string // of the file in which cloud-init keeps it; empty to leave that to cloud-init
	data []byte
}

// multipart is a MIME message of the parts.
func multipart(boundary string, parts []part) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "Content-Type: multipart/mixed; boundary=%q\nMIME-Version: 1.0\n\n", boundary)
	for _, p := range parts {
		fmt.Fprintf(&b, "--%s\n", boundary)
		if p.mime != "" {
			fmt.Fprintf(&b, "Content-Type: %s; charset=\"utf-8\"\nMIME-Version: 1.0\nContent-Transfer-Encoding: 8bit\n", p.mime)
			if p.name != "" {
				fmt.Fprintf(&b, "Content-Disposition: attachment; filename=%q\n", p.name)
			}
			b.WriteByte('\n')
		}
		b.Write(bytes.TrimSuffix(p.data, []byte("\n")))
		b.WriteByte('\n')
	}
	fmt.Fprintf(&b, "--%s--\n", boundary)
	return b.Bytes()
}

func config(v any) ([]byte, error) {
	b, err := yaml.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("writing user data: %w", err)
	}
	if bytes.HasPrefix(b, []byte(cloudConfig+"\n")) {
		return b, nil // it came with the comments of a document
	}
	return append([]byte(cloudConfig+"\n"), b...), nil
}

// mergeConfig puts ours into theirs. Keys are added to theirs; a list of users that
// leaves out the default one gets it back, or lab could not log in; all else is
// replaced. It works on the document rather than on values, so that what it does not
// touch stays as written: cloud-init reads YAML 1.1, where "yes" is a truth value.
func mergeConfig(data string, ours map[string]any) ([]byte, error) {
	theirs, err := readConfig(data)
	if err != nil {
		return nil, err
	}
	for _, k := range slices.Sorted(maps.Keys(ours)) {
		var v yaml.Node
		if err := v.Encode(ours[k]); err != nil {
			return nil, fmt.Errorf("writing user data: %w", err)
		}
		have := value(theirs, k)
		switch {
		case have == nil:
			theirs.Content = append(theirs.Content, &yaml.Node{Kind: yaml.ScalarNode, Value: k}, &v)
		case k == "ssh_authorized_keys" && have.Kind == yaml.SequenceNode:
			have.Content = append(v.Content, have.Content...)
		default:
			*have = v
		}
	}
	users := value(theirs, "users")
	isDefault := func(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.Value == "default" }
	if ours["ssh_keys"] != nil && users != nil && users.Kind == yaml.SequenceNode && !slices.ContainsFunc(users.Content, isDefault) {
		users.Content = append([]*yaml.Node{{Kind: yaml.ScalarNode, Value: "default"}}, users.Content...)
	}
	return config(theirs)
}

// value returns the value of a key of a mapping, or nil.
func value(m *yaml.Node, key string) *yaml.Node {
	for i := 0; i+1 < len(m.Content); i += 2 {
		if m.Content[i].Value == key {
			return m.Content[i+1]
		}
	}
	return nil
}

// mimeType tells what user data is from how it begins, as cloud-init does. It is
// empty for what is a MIME message already.
func mimeType(data string) (string, error) {
	for _, t := range []struct{ prefix, mime string }{
		{"#!", "text/x-shellscript"},
		{"#include-once", "text/x-include-once-url"},
		{"#include", "text/x-include-url"},
		{"#cloud-boothook", "text/cloud-boothook"},
		{"#cloud-config-archive", "text/cloud-config-archive"},
		{"#cloud-config-jsonp", "text/cloud-config-jsonp"},
		{"#part-handler", "text/part-handler"},
		{"## template: jinja", "text/jinja2"},
	} {
		if strings.HasPrefix(data, t.prefix) {
			return t.mime, nil
		}
	}
	name, _, _ := strings.Cut(data, ":")
	switch textproto.CanonicalMIMEHeaderKey(name) {
	case "Content-Type", "Mime-Version":
		return "", nil
	}
	message := "cloud-init does not know what this is; begin with #cloud-config or, for a script, with #!/bin/sh"
	if first := strings.TrimLeft(data, " \t\n"); first != data && strings.HasPrefix(first, "#") {
		message = "cloud-init wants its first line at the very beginning; leave out the space before it"
	}
	return "", &UserDataError{Line: 1, Message: message}
}
