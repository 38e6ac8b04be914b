using System.Security.Cryptography;
using System.Text;
using CsCheck;
using Xunit;

namespace Rollout.Engine.Tests;

public sealed class NfcTests
{
    // sha256 of unicodedata.normalize("NFC", t) over the code points and contexts below; Python 3.14, Unicode 16.
    private const string Reference = "111f8dcbbf70e7543bb9eb3d8061db41af5bb0f86b25199825078c3c19946896";

    [Fact]
    public void Every_character_in_several_contexts_is_as_python_has_it()
    {
        using IncrementalHash hash = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);
        // All that have a decomposition or class: the planes 0 and 1, and the compatibility ideographs of plane 2.
        foreach (int value in Enumerable.Range(0, 0x20000).Where(Rune.IsValid).Concat(Enumerable.Range(0x2F800, 0x220)))
        {
            string s = new Rune(value).ToString();
            foreach (string text in (string[])[s, "A" + s, s + "\u0301", "e\u0327" + s + "\u0300", s + "\u11A8", "\u1100" + s, s + s])
                hash.AppendData(Encoding.UTF8.GetBytes(Nfc.Normalize(text).ToString()));
        }
        Assert.Equal(Reference, Convert.ToHexStringLower(hash.GetHashAndReset()));
    }

    [Theory] // unicodedata.normalize("NFC", t)
    [InlineData("a\u0310\u0301", "a\u0310\u0301")] // a mark of the same class is between them
    [InlineData("a\u0320\u0301", "\u00E1\u0320")]  // one of a lower class does not
    [InlineData("a\u0301\u0320", "\u00E1\u0320")]
    [InlineData("a\u0327\u0310\u0301", "a\u0327\u0310\u0301")]
    [InlineData("a\u0345\u0301", "\u00E1\u0345")]
    [InlineData("e\u0301\u0301", "\u00E9\u0301")]
    [InlineData("\u1100\u0300\u1161", "\u1100\u0300\u1161")]
    public void A_mark_composes_with_its_letter_unless_another_stands_between(string text, string expected)
        => Assert.Equal(expected, Nfc.Normalize(text).ToString());

    [Theory] // unicodedata.normalize("NFC", t): the first and the last of leads, vowels and trails compose, their neighbours do not
    [InlineData("\uAC00\u11A7", "\uAC00\u11A7")]
    [InlineData("\uAC00\u11A8", "\uAC01")]
    [InlineData("\uAC00\u11C2", "\uAC1B")]
    [InlineData("\uAC00\u11C3", "\uAC00\u11C3")]
    [InlineData("\uAC01\u11A8", "\uAC01\u11A8")]
    [InlineData("\uD788\u11C2", "\uD7A3")]
    [InlineData("\uD7A3\u11A8", "\uD7A3\u11A8")]
    [InlineData("\u1112\u1175\u11C2", "\uD7A3")]
    [InlineData("\u1100\u1161\u11A7", "\uAC00\u11A7")]
    [InlineData("\u1113\u1161", "\u1113\u1161")]
    [InlineData("\u10FF\u1161", "\u10FF\u1161")]
    [InlineData("\u1100\u1160", "\u1100\u1160")]
    [InlineData("\u1100\u1176", "\u1100\u1176")]
    public void Hangul_composes_within_its_ranges(string text, string expected) => Assert.Equal(expected, Nfc.Normalize(text).ToString());

    [Fact]
    public void Normalising_twice_changes_nothing() =>
        Gen.OneOf("a", "e", "\u0301", "\u0327", "\u0344", "\u1112", "\u1161", "\u11AB", "\uAC00", "\u212B", "\u0958", "\U0001D15E")
            .Array[0, 12].Select(parts => string.Concat(parts))
            .Sample(text =>
            {
                string once = Nfc.Normalize(text).ToString();
                Assert.Equal(once, Nfc.Normalize(once).ToString());
            }, iter: 5000);
}
