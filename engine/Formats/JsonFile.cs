using System.Text.Json;
using System.Text.Unicode;

namespace Rollout.Engine;

/// <summary>Reads the JSON files of a model folder. Anything wrong with one becomes an <see cref="InvalidModelException"/>.</summary>
internal static class JsonFile
{
    // The largest real ones are tokenizer.json files of some 35 MB.
    private const long MostBytes = 256L << 20;

    /// <summary>
    /// The root of a file that holds a JSON object. Its keys are unique and every string is valid Unicode, so
    /// <see cref="JsonElement.GetString"/> does not throw.
    /// </summary>
    public static JsonElement ReadObject(string path)
    {
        try
        {
            RegularFile.ThrowIfNot(path);
            long length = new FileInfo(path).Length;
            if (length > MostBytes)
                throw new InvalidModelException(path, $"the file has {length} bytes; at most {MostBytes} are read");
            return ParseObject(path, File.ReadAllBytes(path));
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or NotSupportedException)
        {
            throw new InvalidModelException(path, $"cannot be read: {e.Message}", e);
        }
    }

    /// <summary>As <see cref="ReadObject"/>, from memory; <paramref name="path"/> is for messages.</summary>
    public static JsonElement ParseObject(string path, ReadOnlySpan<byte> json)
    {
        try
        {
            if (!Utf8.IsValid(json))
                throw new InvalidModelException(path, "not valid UTF-8");
            CheckStrings(json);
            JsonElement root = JsonElement.Parse(json, new JsonDocumentOptions { AllowDuplicateProperties = false });
            return root.ValueKind == JsonValueKind.Object ? root : throw new InvalidModelException(path, "not a JSON object");
        }
        catch (JsonException e)
        {
            throw new InvalidModelException(path, $"not valid JSON: {e.Message}", e);
        }
        catch (InvalidOperationException e)
        {
            throw new InvalidModelException(path, $"a string is not valid Unicode: {e.Message}", e);
        }
    }

    /// <summary>Unescapes every escaped string; the reader throws InvalidOperationException for half a surrogate pair.</summary>
    private static void CheckStrings(ReadOnlySpan<byte> json)
    {
        Utf8JsonReader reader = new(json);
        while (reader.Read())
        {
            if (reader.TokenType is JsonTokenType.String or JsonTokenType.PropertyName && reader.ValueIsEscaped)
                reader.GetString();
        }
    }
}
