#!/bin/sh
# The tagged text of a TED release of IWSLT (2014, 2015), unpacked, as plain text, a sentence a line.
#
#     configs/translation/iwslt_text.sh FOLDER SOURCE TARGET OUT
#
# writes OUT/train.SOURCE and .TARGET, OUT/valid.* (dev2010) and OUT/test.* (tst2010 to tst2013, those
# that the release has).
set -eu
folder=$1 source=$2 target=$3 out=$4
mkdir -p "$out"
pair="$source-$target"
for language in "$source" "$target"; do
    # Titles, speakers and keywords are lines of their own, which begin with a tag.
    grep -v '^<' "$folder/train.tags.$pair.$language" | sed 's/^ *//; s/ *$//' > "$out/train.$language"
    for part in valid:dev2010 test:tst201[0-3]; do
        cat "$folder"/IWSLT*.TED.${part#*:}."$pair.$language".xml \
            | sed -n 's/^ *<seg id="[0-9]*"> *\(.*[^ ]\) *<\/seg> *$/\1/p' > "$out/${part%%:*}.$language"
    done
done
