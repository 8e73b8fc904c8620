// This program writes an SPDX 2.3 list of what is inside a release to stdout. Of binaries it lists
// the modules that are linked, as their build information tells; of blueprints Debian's packages.
package main

import (
	"bufio"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spdx/tools-golang/json"
	"github.com/spdx/tools-golang/spdx"
	"github.com/spdx/tools-golang/spdx/v2/common"
	"github.com/spdx/tools-golang/spdxlib"
)

func main() {
	version := flag.String("version", "", "Version of the release")
	licenses := flag.String("licenses", "docs/licenses.md", "Table of the modules' licences")
	debian := flag.String("debian", "", "File that lists the Debian packages in blueprints")
	flag.Parse()
	if err := run(*version, *licenses, *debian, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "Error:", err)
		os.Exit(1)
	}
}

const unknown = "NOASSERTION"

// escape is for versions in purls.
var escape = strings.NewReplacer("+", "%2B", ":", "%3A")

// list is a document in the making.
type list struct {
	spdx.Document
	version  string
	licenses [][3]string // package or module, version, licence
}

func run(version, licenses, debian string, files []string) error {
	seconds, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64)
	if err != nil {
		return fmt.Errorf("SOURCE_DATE_EPOCH: %w", err)
	}
	l := &list{version: version}
	l.Document = spdx.Document{
		SPDXVersion: spdx.Version, DataLicense: spdx.DataLicense, SPDXIdentifier: "DOCUMENT",
		DocumentName: "drafter-" + version,
		CreationInfo: &spdx.CreationInfo{
			Created:  time.Unix(seconds, 0).UTC().Format(time.RFC3339),
			Creators: []common.Creator{{CreatorType: "Tool", Creator: "make release"}},
		},
	}
	text, err := os.ReadFile(licenses)
	if err != nil {
		return err
	}
	rows := regexp.MustCompile("(?m)^\\| `([^`]+)` \\| (\\S+) \\| (\\S+)")
	for _, row := range rows.FindAllSubmatch(text, -1) {
		l.licenses = append(l.licenses, [3]string{string(row[1]), string(row[2]), string(row[3])})
	}
	sums := sha256.New()
	for _, f := range files {
		sum, err := l.addFile(f, debian)
		if err != nil {
			return fmt.Errorf("%s: %w", f, err)
		}
		fmt.Fprintln(sums, sum)
	}
	l.DocumentNamespace = fmt.Sprintf("https://spdx.org/spdxdocs/drafter-%s-%x", version,
		sums.Sum(nil)[:16])
	if err := spdxlib.ValidateDocument(&l.Document); err != nil {
		return err
	}
	return json.Write(&l.Document, os.Stdout, json.Indent("  "))
}

// addFile adds a file of the release, and what it consists of. Its name ends with its architecture,
// whatever its extensions.
func (l *list) addFile(path, debian string) (sum string, err error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	sum = hex.EncodeToString(h.Sum(nil))
	name := filepath.Base(path)
	id := l.add(&spdx.Package{
		PackageName: name, PackageVersion: l.version, PackageFileName: name,
		PackageLicenseConcluded: unknown,
		PackageChecksums:        []common.Checksum{{Algorithm: common.SHA256, Value: sum}},
	}, "")
	l.relate("DOCUMENT", "DESCRIBES", id)
	stem, packed := strings.CutSuffix(name, ".tar.zst")
	if !packed {
		stem, packed = strings.CutSuffix(name, ".deb")
	}
	arch := stem[strings.LastIndexAny(stem, "-_")+1:]
	if !packed {
		return sum, l.addModules(f, id)
	}
	for _, program := range []string{"drafter", "drafter-bench", "drafter-guest"} {
		// A blueprint holds the last alone.
		if strings.HasSuffix(name, ".deb") || program == "drafter-guest" {
			l.relate(id, "CONTAINS", elementID(program+".linux-"+arch))
		}
	}
	if strings.HasSuffix(name, ".deb") {
		return sum, nil
	}
	return sum, l.addDebian(debian, id)
}

// addModules adds the modules that a program is built of.
func (l *list) addModules(f io.ReaderAt, program common.ElementID) error {
	info, err := buildinfo.Read(f)
	if err != nil {
		return err
	}
	l.Packages[len(l.Packages)-1].PackageLicenseConcluded = "Apache-2.0"
	goVersion := strings.TrimPrefix(strings.Fields(info.GoVersion)[0], "go")
	l.relate(program, "STATIC_LINK", l.add(&spdx.Package{
		PackageName: "stdlib", PackageVersion: goVersion, PackageLicenseConcluded: "BSD-3-Clause",
	}, "pkg:golang/stdlib@"+goVersion))
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		l.relate(program, "STATIC_LINK", l.add(&spdx.Package{
			PackageName: m.Path, PackageVersion: m.Version,
			PackageLicenseConcluded: l.license(m.Path, m.Version),
		}, "pkg:golang/"+m.Path+"@"+escape.Replace(m.Version)))
	}
	return nil
}

// license is the licence of a module: all that its packages have.
func (l *list) license(module, version string) string {
	version = strings.TrimSuffix(version, "+incompatible")
	var all []string
	for _, row := range l.licenses {
		ours := row[1] == version && (row[0] == module || strings.HasPrefix(row[0], module+"/"))
		if ours && !slices.Contains(all, row[2]) {
			all = append(all, row[2])
		}
	}
	if len(all) == 0 {
		return unknown
	}
	return strings.Join(all, " AND ")
}

// addDebian adds the Debian packages that a blueprint is made of. The list has one a line: name,
// version, architecture, source package and its version.
func (l *list) addDebian(path string, blueprint common.ElementID) (err error) {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		w := strings.Fields(lines.Text())
		if len(w) != 5 {
			return fmt.Errorf("%s: line %q has not five words", path, lines.Text())
		}
		l.relate(blueprint, "CONTAINS", l.add(&spdx.Package{
			PackageName: w[0], PackageVersion: w[1], PackageLicenseConcluded: unknown,
			PackageSourceInfo: "built from Debian's source package " + w[3] + " " + w[4],
		}, "pkg:deb/debian/"+w[0]+"@"+escape.Replace(w[1])+"?arch="+w[2]))
	}
	return lines.Err()
}

// add adds a package, unless it is there, and returns its identifier. One that others make has a
// purl.
func (l *list) add(p *spdx.Package, purl string) common.ElementID {
	p.PackageSPDXIdentifier = elementID(p.PackageName)
	if purl != "" {
		p.PackageSPDXIdentifier = elementID(purl)
		p.PackageExternalReferences = []*spdx.PackageExternalReference{{
			Category: common.CategoryPackageManager,
			RefType:  common.TypePackageManagerPURL,
			Locator:  purl,
		}}
	}
	p.PackageDownloadLocation, p.PackageCopyrightText = unknown, unknown
	p.PackageLicenseDeclared, p.IsFilesAnalyzedTagPresent = unknown, true
	same := func(q *spdx.Package) bool { return q.PackageSPDXIdentifier == p.PackageSPDXIdentifier }
	if !slices.ContainsFunc(l.Packages, same) {
		l.Packages = append(l.Packages, p)
	}
	return p.PackageSPDXIdentifier
}

func (l *list) relate(a common.ElementID, how string, b common.ElementID) {
	l.Relationships = append(l.Relationships, &spdx.Relationship{
		RefA:         common.DocElementID{ElementRefID: a},
		Relationship: how,
		RefB:         common.DocElementID{ElementRefID: b},
	})
}

// elementID is a name in the characters that an identifier may have.
func elementID(name string) common.ElementID {
	return common.ElementID(regexp.MustCompile(`[^A-Za-z0-9.-]+`).ReplaceAllString(name, "-"))
}
