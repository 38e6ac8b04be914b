using System.Text.Json;
using System.Text.Json.Serialization;

namespace Rollout.Gpu;

/// <summary>One number, or one sentence, of a table.</summary>
/// <param name="Stage">1 to 7.</param>
/// <param name="Table">Its heading.</param>
/// <param name="Name">The row's first cell.</param>
/// <param name="Column">The column's heading, with the unit.</param>
internal sealed record Row(int Stage, string Table, string Name, string Column)
{
    /// <summary>What was measured.</summary>
    public double? Value { get; init; }

    /// <summary>Instead of a number.</summary>
    public string? Text { get; init; }

    /// <summary>What the number is held to: at most, or with <see cref="AtLeast"/> at least.</summary>
    public double? Target { get; init; }

    public bool AtLeast { get; init; }

    /// <summary>Why there is neither.</summary>
    public string? Error { get; init; }
}

/// <summary>Rows on disk, one JSON object a line, each there as soon as it is known: whatever ends the process loses none.</summary>
internal static class RowFile
{
    public const string Name = "rows.jsonl";

    private const int MostAttempts = 1000;

    private static readonly JsonSerializerOptions s_json = new(JsonSerializerDefaults.Web)
    {
        DefaultIgnoreCondition = JsonIgnoreCondition.WhenWritingNull,
        NumberHandling = JsonNumberHandling.AllowNamedFloatingPointLiterals,
        Encoder = System.Text.Encodings.Web.JavaScriptEncoder.UnsafeRelaxedJsonEscaping,
    };

    public static void Append(string folder, Row row) => Append(folder, Name, row);

    /// <summary>
    /// A line of another file, of details that no table shows. Processes that have a line at the same time wait for each other.
    /// </summary>
    public static void Append<T>(string folder, string file, T line)
    {
        byte[] bytes = JsonSerializer.SerializeToUtf8Bytes(line, s_json);
        for (int attempt = 1; ; attempt++)
        {
            try
            {
                using FileStream stream = new(Path.Combine(folder, file), FileMode.Append, FileAccess.Write, FileShare.None, bufferSize: 0);
                stream.Write([.. bytes, (byte)'\n']);
                return;
            }
            catch (IOException) when (attempt < MostAttempts)
            {
                Thread.Sleep(5);
            }
        }
    }

    /// <summary>All rows; of those that were measured again the last. A line that was cut short is left out.</summary>
    public static IReadOnlyList<Row> Read(string folder)
    {
        string file = Path.Combine(folder, Name);
        if (!File.Exists(file)) return [];
        Dictionary<(string, string, string), Row> rows = [];
        foreach (string line in File.ReadLines(file))
        {
            try
            {
                if (JsonSerializer.Deserialize<Row>(line, s_json) is { } row) rows[(row.Table, row.Name, row.Column)] = row;
            }
            catch (JsonException)
            {
                // A process was killed while it wrote this.
            }
        }

        return [.. rows.Values];
    }
}
