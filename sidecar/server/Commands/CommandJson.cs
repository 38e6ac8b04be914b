using System.Text.Encodings.Web;
using System.Text.Json;

namespace Rollout.Server.Commands;

/// <summary>JSON for other programs: one line on standard output, floats in the shortest form that parses to the same bits.</summary>
internal static class CommandJson
{
    public static JsonWriterOptions WriterOptions { get; } = new() { Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping };

    public static void Print(Action<Utf8JsonWriter> write)
    {
        using Stream output = Console.OpenStandardOutput();
        using (Utf8JsonWriter json = new(output, WriterOptions)) write(json);
        output.WriteByte((byte)'\n');
    }

    /// <summary>JSON has no infinities and no NaN: they are written as null.</summary>
    public static void WriteFloat(this Utf8JsonWriter json, float value)
    {
        if (float.IsFinite(value)) json.WriteNumberValue(value);
        else json.WriteNullValue();
    }

    public static void WriteFloats(this Utf8JsonWriter json, string name, IEnumerable<float> values)
    {
        json.WriteStartArray(name);
        foreach (float value in values) json.WriteFloat(value);
        json.WriteEndArray();
    }
}
