using System.Text.Json;

namespace Rollout.Engine;

/// <summary>
/// Reads the fields of a JSON object and collects what is wrong with them. A field that is absent and one that is null mean the same, as
/// they do to transformers. After a problem reading goes on, to find the others.
/// </summary>
internal sealed class ConfigReader(JsonElement config, string prefix, List<string> problems)
{
    public List<string> Problems { get; } = problems;

    public bool Has(string name) => Find(name) is not null;

    /// <summary>An integer in [least, most]; required when there is no fallback. 0 after a problem.</summary>
    public int Integer(string name, int least, int most, int? fallback = null)
    {
        JsonElement? field = Find(name);
        if (field is null && fallback is { } value)
            return value;
        if (field is { ValueKind: JsonValueKind.Number } number && number.TryGetInt32(out value) && value >= least && value <= most)
            return value;
        Report(name, field, $"must be an integer from {least} to {most}");
        return 0;
    }

    /// <summary>A number above zero that fp32 can hold; required when there is no fallback. 1 after a problem.</summary>
    public double Positive(string name, double? fallback = null, double most = float.MaxValue)
    {
        JsonElement? field = Find(name);
        if (field is null && fallback is { } value)
            return value;
        if (field is { ValueKind: JsonValueKind.Number } number && number.TryGetDouble(out value) && value > 0 && value <= most)
            return value;
        Report(name, field, most < float.MaxValue ? $"must be a number above 0, at most {most}" : "must be a number above 0");
        return 1;
    }

    public bool Boolean(string name, bool fallback)
    {
        switch (Find(name))
        {
            case null: return fallback;
            case { ValueKind: JsonValueKind.True }: return true;
            case { ValueKind: JsonValueKind.False }: return false;
            case var field:
                Report(name, field, "must be true or false");
                return fallback;
        }
    }

    /// <summary>A string, or null when there is none.</summary>
    public string? Text(string name)
    {
        JsonElement? field = Find(name);
        if (field is null or { ValueKind: JsonValueKind.String })
            return field?.GetString();
        Report(name, field, "must be a string");
        return null;
    }

    /// <summary>Strings of an array; empty when there is none.</summary>
    public IReadOnlyList<string> Texts(string name)
    {
        JsonElement? field = Find(name);
        if (field is { ValueKind: JsonValueKind.Array } array && array.EnumerateArray().All(e => e.ValueKind == JsonValueKind.String))
            return [.. array.EnumerateArray().Select(e => e.GetString()!)];
        if (field is not null)
            Report(name, field, "must be an array of strings");
        return [];
    }

    /// <summary>Token ids below <paramref name="vocabulary"/>: one, an array, or none.</summary>
    public IReadOnlyList<int> TokenIds(string name, int vocabulary)
    {
        JsonElement? field = Find(name);
        if (field is null)
            return [];
        List<int> ids = new();
        JsonElement[] elements = field is { ValueKind: JsonValueKind.Array } array ? [.. array.EnumerateArray()] : [field.Value];
        foreach (JsonElement element in elements)
        {
            if (element.ValueKind == JsonValueKind.Number && element.TryGetInt32(out int id) && id >= 0 && id < vocabulary)
                ids.Add(id);
            else
                Report(name, element, $"must be a token id, or an array of them, from 0 to {vocabulary - 1}");
        }
        return [.. ids.Distinct()];
    }

    /// <summary>A nested object, or null when there is none.</summary>
    public ConfigReader? Nested(string name)
    {
        JsonElement? field = Find(name);
        if (field is { ValueKind: JsonValueKind.Object } nested)
            return new ConfigReader(nested, $"{prefix}{name}.", Problems);
        if (field is not null)
            Report(name, field, "must be an object");
        return null;
    }

    /// <summary>Names of the fields that are objects themselves.</summary>
    public IEnumerable<string> NestedNames() =>
        config.EnumerateObject().Where(field => field.Value.ValueKind == JsonValueKind.Object).Select(field => field.Name);

    /// <summary>Says what is wrong with a field, and what it holds.</summary>
    public void Report(string name, string problem) => Report(name, Find(name), problem);

    private void Report(string name, JsonElement? value, string problem)
    {
        const int Most = 60;
        string text = value?.GetRawText() ?? "";
        string found = value is null ? "it is missing" : text.Length > Most ? $"it is {text[..Most]}..." : $"it is {text}";
        Problems.Add($"{prefix}{name} {problem}; {found}");
    }

    private JsonElement? Find(string name) =>
        config.TryGetProperty(name, out JsonElement field) && field.ValueKind != JsonValueKind.Null ? field : null;
}
