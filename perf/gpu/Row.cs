using System.Text.Json;
using System.Text.Json.Serialization;

namespace Rollout.Gpu;

/// <summary>One cell of a table: a number or a text.</summary>
/// <param name="Stage">1 to 7.</param>
/// <param name="Table">The table's heading.</param>
/// <param name="Name">The row's first cell.</param>
/// <param name="Column">The column's heading, with the unit.</param>
internal sealed record Row(int Stage, string Table, string Name, string Column)
{
    /// <summary>The measured number.</summary>
    public double? Value { get; init; }

    /// <summary>A text instead of a number.</summary>
    public string? Text { get; init; }

    /// <summary>The target: an upper bound, or with <see cref="AtLeast"/> a lower one.</summary>
    public double? Target { get; init; }

    public bool AtLeast { get; init; }

    /// <summary>Why there is neither number nor text.</summary>
    public string? Error { get; init; }
}

/// <summary>
/// Rows on disk, one JSON object a line, each written as soon as it is known, so that none is lost when the process is killed.
/// </summary>
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
    /// Appends a line to another file, with details that no table shows. Processes that write at the same time wait for each other.
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

    /// <summary>All rows; of repeated measurements the last. An incomplete line is left out.</summary>
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
                // The process was killed while it wrote this line.
            }
        }

        return [.. rows.Values];
    }
}
